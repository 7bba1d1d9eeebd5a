// What the primitives on Zigzag matrices share: checks when the graph is built, memory when it runs.
#pragma once

#include <optional>
#include <stdexcept>
#include <vector>

#include "job.h"
#include "mlx/primitives.h"
#include "zigzag.h"

namespace spqt {

class OnCpu : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[spqt] The CPU extension was called on another device.");
  }

 protected:
  // Room for the outputs, and the inputs in order from `first` on: x of a product is read by its stride.
  Arrays ready(const Arrays& inputs, Arrays& outputs, size_t first = 1);
  // Each output holds the inputs, all but the first of these for nothing: dropped, or no cache could be reused.
  static void drop_inputs(const Arrays& inputs, Arrays& outputs);
  // `out` with the values of `in`: its memory where nobody else needs it.
  void take_over(const mlx::core::array& in, mlx::core::array& out);
};

using Count = std::optional<mlx::core::array>;

// Checks projections and appends their arrays; returns their shapes.
// ndim: of a weight, 4 where each projection holds experts.
std::vector<ProjectionShape> taken(const std::vector<Projection>& projections, int inputs, Arrays& arrays,
                                   int ndim = 3);
int inputs_of(const std::vector<Projection>& projections, int ndim = 3);
// Checks x and returns how many rows it has: 1 to MOST_ROWS.
int require_rows(const mlx::core::array& x, int inputs);
int require_float_rows(const mlx::core::array& x, int inputs);
// The shape of the counts of some projections.
mlx::core::Shape counts_shape(int projections, int rows);
// Appends counts of that shape, if there are any.
void add_counts(Arrays& in, const Count& counted, int projections, int rows);

// down(silu(gate) * up) of float32 rows, as jobs that run one after another.
struct GatedJob {
  std::shared_ptr<Job> pair, down;
  float *gate, *up;
  int middle;  // of all rows
};
// As `taken`, of gate and up, then down.
GatedShape taken_gated(const std::vector<Projection>& pair, const Projection& down, int inputs, Arrays& arrays);
struct GatedPlaces {
  float* y;
  float* between;  // 2 * middle floats for each row
  Counts pair, down;
};
// in: from gate's arrays on
GatedJob plan_gated(const GatedShape& shape, const Row& x, const Operands& in, const GatedPlaces& places,
                    mlx::core::Stream stream);
void run_gated(const GatedJob& job);

}  // namespace spqt
