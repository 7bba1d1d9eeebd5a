// A transformer block's two sides of attention, each as one operation, float32, for 1 to 64 rows.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "zigzag.h"

namespace spqt {

// RMS normalization and the projections of its result.
class HeadStep {
 public:
  // weight (inputs,) float32
  HeadStep(const mlx::core::array& weight, float eps, const std::vector<Projection>& projections);

  // Returns norm(x), y per projection, and counts as SparseStep's.
  std::tuple<mlx::core::array, std::vector<mlx::core::array>, mlx::core::array> operator()(
      const mlx::core::array& x,
      const std::optional<mlx::core::array>& counted) const;

 private:
  friend class ChainStep;
  int inputs_;
  float eps_;
  std::vector<ProjectionShape> shapes_;
  std::vector<mlx::core::array> arrays_;
};

// h = x + out(attended); y = h + down(silu(gate) * up), both of norm(h).
class TailStep {
 public:
  TailStep(
      const Projection& out,
      const mlx::core::array& weight,
      float eps,
      const std::vector<Projection>& pair,
      const Projection& down);

  // Returns y, and the counts of out, of gate and up, and of down; counted: the three of the step before, or none.
  std::pair<mlx::core::array, std::vector<mlx::core::array>> operator()(
      const mlx::core::array& attended,
      const mlx::core::array& x,
      const std::vector<std::optional<mlx::core::array>>& counted) const;

 private:
  friend class ChainStep;
  int inputs_;  // of out
  float eps_;
  std::vector<mlx::core::array> arrays_;  // before the shapes, which fill it
  ProjectionShape out_;
  GatedShape gated_;
};

// h = x + out(attended), and norm(h): what stands between attention and a feed-forward module of another form.
class MiddleStep {
 public:
  MiddleStep(const Projection& out, const mlx::core::array& weight, float eps);

  // Returns h and norm(h), and the count of out, as TailStep's.
  std::pair<std::pair<mlx::core::array, mlx::core::array>, std::vector<mlx::core::array>> operator()(
      const mlx::core::array& attended,
      const mlx::core::array& x,
      const std::vector<std::optional<mlx::core::array>>& counted) const;

 private:
  int inputs_;  // of out
  float eps_;
  std::vector<mlx::core::array> arrays_;  // before the shape, which fills it
  ProjectionShape out_;
};

}  // namespace spqt
