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

struct ProjectionShape {
  int outputs, bits, group_size;
  bool has_threshold, has_bias;
};

struct GatedShape {
  std::vector<ProjectionShape> pair;
  ProjectionShape down;
};

// One token, or a few, through several projections of one input. What does not depend on x is done once.
class SparseStep {
 public:
  explicit SparseStep(const std::vector<Projection>& projections);

  // x holds 1 to 64 rows of `inputs` values. Returns y per projection, with x's leading axes, and counted plus
  // the active channels of each: uint32 (projections,) for one row, else (projections, rows + 1), the last being
  // the channels whose weights were read. counted: of the same shape, or none.
  std::pair<std::vector<mlx::core::array>, mlx::core::array> operator()(
      const mlx::core::array& x,
      const std::optional<mlx::core::array>& counted) const;

 private:
  int inputs_;
  std::vector<ProjectionShape> shapes_;
  std::vector<mlx::core::array> arrays_;
};

// Few tokens through some experts each, of projections of one input: weight (experts, bands, inputs, words), and so
// scales and biases; bias (experts, outputs). A row is what that expert's matrix alone gives, bit for bit.
class ExpertsStep {
 public:
  explicit ExpertsStep(const std::vector<Projection>& projections);

  // x: rows of `inputs` values; indices: uint32, as many for each row of x, at most 512. Returns of each projection y,
  // (*indices' axes, 1, outputs), and counted plus the active channels over all indices, uint32 (projections,).
  // An index that is no expert's gives NaN.
  std::pair<std::vector<mlx::core::array>, mlx::core::array> operator()(
      const mlx::core::array& x,
      const mlx::core::array& indices,
      const std::optional<mlx::core::array>& counted) const;

 private:
  int inputs_;
  std::vector<ProjectionShape> shapes_;
  std::vector<mlx::core::array> arrays_;
};

// Tokens through down(silu(gate) * up), float32.
class GatedStep {
 public:
  GatedStep(const std::vector<Projection>& pair, const Projection& down);

  // Returns y, and the counts of gate and up, and of down, as SparseStep's.
  std::tuple<mlx::core::array, mlx::core::array, mlx::core::array> operator()(
      const mlx::core::array& x,
      const std::optional<mlx::core::array>& counted,
      const std::optional<mlx::core::array>& counted_down) const;

 private:
  int inputs_;
  std::vector<mlx::core::array> arrays_;  // before shape_, which fills it
  GatedShape shape_;
};

}  // namespace spqt
