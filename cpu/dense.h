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

// The same for each row of x (rows, inputs) by the expert that `indices` (rows,), uint32, says: weight (experts, bands,
// inputs, words), bias (experts, outputs). Rows with one expert that follow one another are multiplied together; an
// index that is no expert's gives NaN.
mlx::core::array experts_matmul(
    const mlx::core::array& x,
    const mlx::core::array& indices,
    const mlx::core::array& weight,
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const std::optional<mlx::core::array>& bias,
    int outputs,
    int bits,
    int group_size);

// The same as the first for MLX's layout: weight (outputs, words), scales and biases (outputs, inputs / group_size).
mlx::core::array row_matmul(
    const mlx::core::array& x,
    const mlx::core::array& weight,
    const mlx::core::array& scales,
    const mlx::core::array& biases,
    const std::optional<mlx::core::array>& bias,
    int bits,
    int group_size);

}  // namespace spqt
