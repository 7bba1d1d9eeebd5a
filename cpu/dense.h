// Primitives that use every input channel: prompts and batches, and matrices in MLX's own layout.
#pragma once

#include <optional>

#include "mlx/array.h"

namespace spqt {

// x @ W.T + bias for a Zigzag matrix: weight (bands, inputs, words); x (..., inputs) -> (..., outputs).
mlx::core::array zigzag_matmul(
    const mlx::core::array& x,
    const mlx::core::array& weight,
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const std::optional<mlx::core::array>& bias,
    int outputs,
    int bits,
    int group_size);

// The same for MLX's layout: weight (outputs, words), scales and biases (outputs, inputs / group_size).
mlx::core::array row_matmul(
    const mlx::core::array& x,
    const mlx::core::array& weight,
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const std::optional<mlx::core::array>& bias,
    int bits,
    int group_size);

}  // namespace spqt
