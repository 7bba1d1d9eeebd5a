// Checks shared by the primitives, made when the graph is built, so that they may raise.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx/stream.h"
#include "mlx/utils.h"

namespace spqt {

inline mlx::core::Stream cpu_stream() { return mlx::core::to_stream({}, mlx::core::Device::cpu); }

inline bool is_floating(const mlx::core::array& a) {
  return a.dtype() == mlx::core::float32 || a.dtype() == mlx::core::float16 ||
      a.dtype() == mlx::core::bfloat16;
}

inline Type type_of(const mlx::core::array& a) {
  if (a.dtype() == mlx::core::float16) return FLOAT16;
  return a.dtype() == mlx::core::bfloat16 ? BFLOAT16 : FLOAT32;
}

inline void require(bool met, const std::string& what) {
  if (!met) throw std::invalid_argument("[spqt] " + what);
}

// Evaluated arrays that lie in order are passed on as they are: a node in the graph costs microseconds.
inline mlx::core::array in_order(const mlx::core::array& a, mlx::core::Stream s) {
  if (a.is_available() && a.flags().row_contiguous) return a;
  return mlx::core::contiguous(a, false, s);
}

}  // namespace spqt
