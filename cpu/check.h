// Checks shared by the primitives, made when the graph is built, so that they may raise.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx/stream.h"
#include "mlx/utils.h"

namespace spqt {

constexpr int MAX_ROW_GROUPS = 4096;  // of MLX's own layout: a row of up to 131,072 inputs

inline mlx::core::Stream cpu_stream() { return mlx::core::to_stream({}, mlx::core::Device::cpu); }

inline bool is_floating(const mlx::core::array& a) {
  return a.dtype() == mlx::core::float32 || a.dtype() == mlx::core::float16 ||
      a.dtype() == mlx::core::bfloat16;
}

inline Type type_of(const mlx::core::array& a) {
  if (a.dtype() == mlx::core::float16) return FLOAT16;
  return a.dtype() == mlx::core::bfloat16 ? BFLOAT16 : FLOAT32;
}

// `what` is no string yet: this runs for every product of every token
inline void require(bool met, const char* what) {
  if (!met) throw std::invalid_argument(std::string("[spqt] ") + what);
}

inline void require_inputs(int found, int wanted) {
  if (found != wanted)
    throw std::invalid_argument("[spqt] x has " + std::to_string(found) + " channels, the weight " +
                                std::to_string(wanted) + ".");
}

inline void require_format(const mlx::core::array& weight, int ndim, int bits, int group_size) {
  require((int)weight.ndim() == ndim && weight.dtype() == mlx::core::uint32,
          ndim == 4 ? "weight must be 4-D and uint32."
                    : ndim == 3 ? "weight must be 3-D and uint32." : "weight must be 2-D and uint32.");
  require(bits >= 2 && bits <= 8 && bits != 7, "bits must be 2, 3, 4, 5, 6 or 8.");
  require(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128.");
  require(weight.shape(-1) > 0 && (int64_t)weight.shape(-1) * 32 % (bits * group_size) == 0,
          "a row of the weight is not a whole number of groups.");
}

inline void require_scales(
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const mlx::core::Shape& shape) {
  require(scales.shape() == shape && biases.shape() == shape && is_floating(scales) &&
              biases.dtype() == scales.dtype(),
          "scales and biases must be of the weight's groups and of one floating type.");
}

inline void require_bias(const std::optional<mlx::core::array>& bias, int outputs) {
  require(!bias || (is_floating(*bias) && bias->size() == (size_t)outputs), "bias must be (outputs,).");
}

// weight (bands, inputs, words), scales and biases (bands, inputs, groups); of `ndim` 4 with experts in front, of
// which each then has a bias
inline void require_zigzag(
    const mlx::core::array& weight,
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const std::optional<mlx::core::array>& bias,
    int inputs,
    int outputs,
    int bits,
    int group_size,
    int ndim = 3) {
  require_format(weight, ndim, bits, group_size);
  require_inputs(inputs, weight.shape(-2));
  const int64_t bands = weight.shape(-3), band = (int64_t)weight.shape(-1) * 32 / bits;
  mlx::core::Shape shape = weight.shape();
  shape.back() = band / group_size;
  require_scales(scales, biases, shape);
  require(outputs > (bands - 1) * band && outputs <= bands * band && outputs > 0, "outputs do not fit the bands.");
  if (ndim == 3) return require_bias(bias, outputs);
  require(weight.shape(0) > 0, "there must be an expert.");
  require(!bias || (is_floating(*bias) && bias->shape() == mlx::core::Shape{weight.shape(0), outputs}),
          "bias must be (experts, outputs).");
}

// weight (outputs, words), scales and biases (outputs, groups)
inline void require_rows(
    const mlx::core::array& weight,
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const std::optional<mlx::core::array>& bias,
    int inputs,
    int bits,
    int group_size) {
  require_format(weight, 2, bits, group_size);
  require_inputs(inputs, (int64_t)weight.shape(1) * 32 / bits);
  require(inputs / group_size <= MAX_ROW_GROUPS, "the rows are too long.");
  require_scales(scales, biases, {weight.shape(0), inputs / group_size});
  require_bias(bias, weight.shape(0));
}

// Makes room for the values of an output.
void allocate(mlx::core::array& out);

// `a` itself where its values lie in order (with `axes` 1: where those of its last axis do), else a copy
// made on the stream. For use in eval_cpu: a node in the graph for it would cost microseconds a call.
mlx::core::array in_order(const mlx::core::array& a, mlx::core::Stream s, int axes = 0);

}  // namespace spqt
