#include "fit.h"

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

}  // namespace spqt
