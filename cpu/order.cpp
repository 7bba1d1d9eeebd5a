#include <cstring>

#include "check.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "scratch.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

// How an array lies: runs of bytes side by side, and the axes around them with strides in bytes.
struct Layout {
  mx::Shape shape;
  mx::Strides strides;
  size_t run;
};

Layout layout_of(const mx::array& a) {
  Layout found{a.shape(), a.strides(), a.itemsize()};
  for (int64_t& stride : found.strides) stride *= a.itemsize();
  while (!found.shape.empty() && (found.shape.back() == 1 || found.strides.back() == (int64_t)found.run)) {
    found.run *= found.shape.back();
    found.shape.pop_back();
    found.strides.pop_back();
  }
  return found;
}

// RUN: the bytes of a run, if known: a call of memcpy for each number takes ten times as long.
template <size_t RUN>
uint8_t* copy_axis(const uint8_t* from, uint8_t* to, const Layout& all, size_t axis) {
  const size_t run = RUN ? RUN : all.run;
  if (axis == all.shape.size()) {
    std::memcpy(to, from, run);
    return to + run;
  }
  const int64_t stride = all.strides[axis];
  if (axis + 1 < all.shape.size()) {
    for (int i = 0; i < all.shape[axis]; ++i) to = copy_axis<RUN>(from + i * stride, to, all, axis + 1);
    return to;
  }
  for (int i = 0; i < all.shape[axis]; ++i, to += run) std::memcpy(to, from + i * stride, run);
  return to;
}

void copy(const uint8_t* from, uint8_t* to, const Layout& all) {
  auto by_axis = all.run == 4 ? copy_axis<4> : all.run == 2 ? copy_axis<2> : copy_axis<0>;
  by_axis(from, to, all, 0);
}

}  // namespace

void allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  poison(out.data<uint8_t>(), out.nbytes());
}

mx::array in_order(const mx::array& a, mx::Stream s, int axes) {
  if (a.flags().row_contiguous || (axes == 1 && (a.shape(-1) == 1 || a.strides(-1) == 1))) return a;
  mx::array ordered(a.shape(), a.dtype(), nullptr, {});
  allocate(ordered);
  auto& encoder = mx::cpu::get_command_encoder(s);
  encoder.dispatch([from = a.data<uint8_t>(), to = ordered.data<uint8_t>(), all = layout_of(a)]() {
    copy(from, to, all);
  });
  encoder.add_temporary(ordered);
  return ordered;
}

}  // namespace spqt
