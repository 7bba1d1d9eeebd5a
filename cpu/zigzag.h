// Primitives on Zigzag matrices, lazy in MLX's graph.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "mlx/array.h"

namespace spqt {

// weight (bands, inputs, words), scales and biases (bands, inputs, groups), threshold (1,) or (inputs,) or
// none, the layer's bias (outputs,) or none, outputs, bits, group size
using Projection = std::tuple<
    mlx::core::array,
    mlx::core::array,
    mlx::core::array,
    std::optional<mlx::core::array>,
    std::optional<mlx::core::array>,
    int,
    int,
    int>;

// One token through several projections of one input; x holds `inputs` values.
// Returns y per projection, with x's leading axes, and the active channels of each, uint32.
std::pair<std::vector<mlx::core::array>, mlx::core::array> sparse_gemv(
    const mlx::core::array& x,
    const std::vector<Projection>& projections);

}  // namespace spqt
