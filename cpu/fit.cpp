#include "fit.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "check.h"
#include "kernels.h"
#include "pool.h"
#include "scratch.h"

namespace spqt {
namespace {

void run_group(void* context, int group) {
  Compensate job = *static_cast<Compensate*>(context);
  const int64_t rows = (int64_t)group * job.inputs;
  job.errors += rows * job.group_size;
  job.codes += rows * job.group_size;
  job.scales += rows;
  job.biases += rows;
  kernels().compensate(job, thread_work());
}

struct Way {  // back through a layer
  Slopes slopes;
  const float* dy;  // as the caller has it
  float* packed;    // as the kernel takes it: in dy the rows of one group lie too far apart
};

void pack_group(void* context, int group) {
  const Way& way = *static_cast<Way*>(context);
  const Slopes& s = way.slopes;
  const size_t size = s.group_size, outputs = (size_t)s.bands * s.band, rows = s.rows, padded = slope_rows(s.rows);
  float* to = way.packed + group * padded * size;
  for (size_t row = 0; row < rows; ++row)
    std::memcpy(to + row * size, way.dy + row * outputs + group * size, size * sizeof(float));
  std::memset(to + rows * size, 0, (padded - rows) * size * sizeof(float));
}

void run_inputs(void* context, int task) {
  Slopes job = static_cast<Way*>(context)->slopes;
  job.first = task * SLOPE_INPUTS;
  kernels().slopes(job, thread_work());
}

void each(bool alone, int tasks, void (*fn)(void*, int), void* context) {
  if (!alone) return parallel(tasks, fn, context);
  for (int task = 0; task < tasks; ++task) fn(context, task);
}

}  // namespace

void compensate(
    Numbers<float, 3> errors,
    Numbers<const float, 2> factor,
    int bits,
    int type,
    Numbers<uint8_t, 3> codes,
    Numbers<float, 2> scales,
    Numbers<float, 2> biases) {
  const size_t groups = errors.shape(0), inputs = errors.shape(1), size = errors.shape(2);
  require(size == 32 || size == 64 || size == 128, "group_size must be 32, 64 or 128.");
  require(bits >= 2 && bits <= 8 && bits != 7, "bits must be 2, 3, 4, 5, 6 or 8.");
  require(type >= FLOAT32 && type <= BFLOAT16, "type must be 0, 1 or 2.");
  require(groups < (1u << 20) && inputs < (1u << 30), "the matrix is too large.");
  require(factor.shape(0) == inputs && factor.shape(1) == inputs, "factor must be (inputs, inputs).");
  require(codes.shape(0) == groups && codes.shape(1) == inputs && codes.shape(2) == size, "codes must be as errors.");
  for (const auto& part : {scales, biases})
    require(part.shape(0) == groups && part.shape(1) == inputs, "scales and biases must be (groups, inputs).");
  Compensate job{errors.data(), factor.data(), codes.data(), scales.data(), biases.data(),
                 (int)inputs, (int)size, bits, (Type)type};
  nanobind::gil_scoped_release release;
  parallel((int)groups, run_group, &job);
}

void slopes(
    Numbers<const float, 2> dy,
    Numbers<const float, 2> x,
    Numbers<const float, 3> w,
    int group_size,
    bool alone,
    Numbers<float, 2> dx,
    Numbers<float, 3> dots) {
  const size_t rows = x.shape(0), inputs = x.shape(1), bands = w.shape(0), band = w.shape(2);
  require(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128.");
  require(rows > 0 && inputs > 0 && bands > 0 && band > 0, "there must be rows, inputs and outputs.");
  require(band % group_size == 0, "a band must be a whole number of groups.");
  require(rows < (1u << 30) && inputs < (1u << 30), "x is too large.");
  require(bands < (1u << 20) && band < (1u << 20) && bands * band < (1u << 30), "w is too large.");
  require(w.shape(1) == inputs, "w must be (bands, inputs, band), of the inputs of x.");
  require(dy.shape(0) == rows && dy.shape(1) == bands * band, "dy must be (rows, bands * band).");
  require(dx.shape(0) == rows && dx.shape(1) == inputs, "dx must be as x.");
  const size_t groups = band / group_size;
  require(dots.shape(0) == bands && dots.shape(1) == inputs && dots.shape(2) == groups,
          "dots must be (bands, inputs, groups of a band).");
  // parts of about as many rows: what is packed of one stays in the caches
  const int parts = ((int)rows + MOST_SLOPE_ROWS - 1) / MOST_SLOPE_ROWS;
  const int most = slope_rows(((int)rows + parts - 1) / parts);
  const size_t floats = most * bands * band;
  const std::unique_ptr<float[]> packed(new float[floats]);
  nanobind::gil_scoped_release release;
  poison(dx.data(), dx.nbytes());
  poison(dots.data(), dots.nbytes());
  for (size_t row = 0; row < rows; row += most) {
    const int count = (int)std::min<size_t>(most, rows - row);
    Way way{{packed.get(), x.data() + row * inputs, w.data(), dx.data() + row * inputs, dots.data(), count, (int)inputs,
             (int)bands, (int)band, group_size, 0, row > 0}, dy.data() + row * bands * band, packed.get()};
    poison(packed.get(), floats * sizeof(float));
    each(alone, (int)(bands * groups), pack_group, &way);
    each(alone, (int)((inputs + SLOPE_INPUTS - 1) / SLOPE_INPUTS), run_inputs, &way);
  }
}

}  // namespace spqt
