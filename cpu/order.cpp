#include <cstring>

#include "check.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "scratch.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

// Copies axis after axis; strides are in bytes.
uint8_t* copy_axis(const uint8_t* from, uint8_t* to, const mx::Shape& shape, const mx::Strides& strides,
                   size_t axis, size_t item) {
  if (axis == shape.size()) {
    std::memcpy(to, from, item);
    return to + item;
  }
  for (int i = 0; i < shape[axis]; ++i)
    to = copy_axis(from + i * strides[axis] * (int64_t)item, to, shape, strides, axis + 1, item);
  return to;
}

}  // namespace

void allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  poison(out.data<uint8_t>(), out.nbytes());
}

mx::array in_order(const mx::array& a, mx::Stream s, int axes) {
  if (a.flags().row_contiguous || (axes == 1 && (a.shape(-1) == 1 || a.strides(-1) == 1))) return a;
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  allocate(copy);
  auto& encoder = mx::cpu::get_command_encoder(s);
  encoder.dispatch([from = a.data<uint8_t>(), to = copy.data<uint8_t>(), shape = a.shape(),
                    strides = a.strides(), item = a.itemsize()]() {
    copy_axis(from, to, shape, strides, 0, item);
  });
  encoder.add_temporary(copy);
  return copy;
}

}  // namespace spqt
