// One product of several projections with one input, cut into tasks: made when the graph runs, then run.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "mlx/array.h"
#include "zigzag.h"

namespace spqt {

using Arrays = std::vector<mlx::core::array>;

// Active channels of each projection: `active` becomes `before`, or zero, and those of this product. Of several
// rows: those of each, and last the channels whose weights were read, each as often as it was.
struct Counts {
  uint32_t* active;  // counts_of(rows) for each projection, or nullptr: nobody asks
  const uint32_t* before;
};
constexpr int counts_of(int rows) { return rows > 1 ? rows + 1 : 1; }

// The values of some tokens: a row's lie `stride` elements apart, one row after another where there are several.
struct Row {
  const void* data;
  Type type;
  int64_t stride;
  int rows = 1;
};
Row row_of(const mlx::core::array& x);
Row rows_of(const mlx::core::array& x);  // x in order

constexpr int MOST_ROWS = 64;  // for which this product is made

// Which expert's matrix multiplies each row, where a projection holds several; `pairs` rows of the outputs, of
// which each x serves as many that follow one another. Read by run_job.
struct Chosen {
  const uint32_t* experts;  // (pairs,)
  int pairs;
};
constexpr int MOST_CHOSEN = 512;  // pairs for which this product is made

// Arrays in order; from `at` on, of each projection weight, scales, biases and what it has of threshold and bias.
struct Operands {
  const Arrays& arrays;
  size_t at;
};

// Where the outputs of one projection go, one row after another.
struct Place {
  void* data;
  Type type;
};

// Makes an output NaN: that of an expert that there is not.
void fill_with_nan(const Output& out);

struct Job;

// y: of each projection. x and y are only read and written by run_job. chosen: if the projections hold experts;
// then every row is computed by itself, and counts are one number for each projection.
std::shared_ptr<Job> plan(const std::vector<ProjectionShape>& shapes, const Row& x, const Operands& in,
                          const std::vector<Place>& y, const Counts& counts, mlx::core::Stream stream,
                          const Chosen* chosen = nullptr);
void run_job(Job& job);

// Where the arrays of the projection after the one at `at` begin.
size_t after(const ProjectionShape& s, size_t at);

}  // namespace spqt
