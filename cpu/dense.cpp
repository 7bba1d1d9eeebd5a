#include "dense.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "job.h"
#include "mlx/backend/cpu/encoder.h"
#include "native.h"
#include "pool.h"
#include "scratch.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

constexpr size_t ROW_TASK_BYTES = 64 * 1024;  // of weights: small enough to share out evenly

struct GemmJob {
  std::vector<Gemm> tasks;
};

struct RowJob {
  Scratch memory;
  Input input;  // of the first token
  int64_t x_stride;  // bytes from one token to the next
  Rows rows;  // of the whole matrix and all tokens
  int rows_per_task, tasks;
};

void run_gemm(void* context, int task) {
  kernels().gemm(static_cast<GemmJob*>(context)->tasks[task], thread_work());
}

void run_rows(void* context, int task) {
  static_assert(MAX_ROW_GROUPS + PADDING <= WORK);
  const RowJob& job = *static_cast<RowJob*>(context);
  Rows part = job.rows;
  part.first = task * job.rows_per_task;
  part.count = std::min(job.rows_per_task, job.rows.count - part.first);
  for (int left = job.rows.tokens; left > 0; left -= part.tokens) {  // each reads the task's weights, from a cache
    part.tokens = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    kernels().rows(part, thread_work());
    part.prepared += part.tokens * part.stride;
    part.group_sums += part.tokens * part.stride;
    part.out.y = static_cast<uint8_t*>(part.out.y) + part.tokens * part.y_stride * (part.out.type == FLOAT32 ? 4 : 2);
  }
}

void run_all_rows(RowJob& job) {
  job.memory.start();
  Input token = job.input;
  for (int t = 0; t < job.rows.tokens; ++t) {
    const size_t at = t * job.rows.stride;
    kernels().prepare(token, job.rows.weights.bits, job.rows.weights.group_size,
                      const_cast<float*>(job.rows.prepared) + at, const_cast<float*>(job.rows.group_sums) + at);
    token.x = static_cast<const uint8_t*>(token.x) + job.x_stride;
  }
  parallel(job.tasks, run_rows, &job);
}

// Whether x is one token, or one of each of some sequences: (sequences, 1, inputs).
bool is_token_each(const mx::array& x) {
  return x.size() == (size_t)x.shape(-1) || (x.ndim() == 3 && x.shape(1) == 1);
}

class Dense : public Native {
 public:
  Dense(mx::Stream stream, Fallback fallback, int bits, int group_size, bool along_inputs)
      : Native(stream, std::move(fallback)), bits_(bits), group_size_(group_size), along_inputs_(along_inputs) {}

  // inputs: x (float32 unless it is tokens by themselves and groups lie along it), weight, scales, biases, maybe bias
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    mx::array& out = outputs[0];
    allocate(out);
    if (out.size() == 0) return;
    Arrays in;
    for (const mx::array& a : inputs) in.push_back(in_order(a, stream()));
    if (along_inputs_ && is_token_each(in[0])) {
      encoder.dispatch([job = plan_rows(in, out)]() { run_all_rows(*job); });
    } else {
      encoder.dispatch([job = plan_gemm(in, out)]() { parallel(job->tasks.size(), run_gemm, job.get()); });
    }
  }

  const char* name() const override { return "SpqtDense"; }

 private:
  Tile weights(const std::vector<mx::array>& in, int band) {
    const mx::array &w = in[1], &scales = in[2], &biases = in[3];
    const size_t codes = (size_t)band * w.shape(-2) * w.shape(-1) * 4;
    const size_t group = (size_t)band * scales.shape(-2) * scales.shape(-1) * scales.itemsize();
    return {w.data<uint8_t>() + codes, (size_t)w.shape(-1) * 4, scales.data<uint8_t>() + group,
            biases.data<uint8_t>() + group, (size_t)scales.shape(-1), type_of(scales), 0, group_size_, bits_};
  }

  static Output output(const std::vector<mx::array>& in, mx::array& out, size_t row, int first, int count) {
    const mx::array* bias = in.size() > 4 ? &in[4] : nullptr;
    return {out.data<uint8_t>() + (row * out.shape(-1) + first) * out.itemsize(), type_of(out), count,
            bias ? bias->data<uint8_t>() + first * bias->itemsize() : nullptr,
            bias ? type_of(*bias) : FLOAT32};
  }

  std::shared_ptr<GemmJob> plan_gemm(const Arrays& in, mx::array& out) {
    const int inputs = in[0].shape(-1), outputs = out.shape(-1);
    const int rows = in[0].size() / inputs;
    const int band = along_inputs_ ? outputs : in[2].shape(2) * group_size_;
    const int chunks = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
    const int chunk = std::min(((rows + chunks - 1) / chunks + 11) / 12 * 12, GEMM_ROWS);  // whole row tiles
    auto job = std::make_shared<GemmJob>();
    for (int start = 0; start < outputs; start += band)
      for (int first = 0; first < std::min(band, outputs - start); first += GEMM_OUTPUTS)
        for (int row = 0; row < rows; row += chunk) {
          int count = std::min({GEMM_OUTPUTS, band - first, outputs - start - first});
          job->tasks.push_back({in[0].data<float>() + (size_t)row * inputs, inputs, std::min(chunk, rows - row),
                                inputs, weights(in, start / band), first, along_inputs_,
                                output(in, out, row, start + first, count), outputs});
        }
    return job;
  }

  std::shared_ptr<RowJob> plan_rows(const Arrays& in, mx::array& out) {
    const int inputs = in[0].shape(-1), outputs = out.shape(-1);
    auto job = std::make_shared<RowJob>();
    const int tokens = in[0].size() / inputs;
    const size_t stride = prepared_size(inputs) + (inputs / group_size_ + PADDING - 1) / PADDING * PADDING;
    job->memory = scratch(stream().index, PARTIALS, tokens * stride);
    float* prepared = job->memory.get();
    job->input = {in[0].data<void>(), type_of(in[0]), 1, inputs, nullptr, 0};
    job->x_stride = (int64_t)inputs * in[0].itemsize();
    job->rows = {weights(in, 0), inputs, 0, outputs, prepared, prepared + prepared_size(inputs),
                 output(in, out, 0, 0, outputs), tokens, stride, outputs};
    job->rows_per_task = std::max<int>(1, ROW_TASK_BYTES / job->rows.weights.code_stride);
    job->tasks = (outputs + job->rows_per_task - 1) / job->rows_per_task;
    return job;
  }

  int bits_, group_size_;
  bool along_inputs_;
};

// Rows [first, first + count) of a product by experts, all of one expert.
struct Run {
  int first, count;
  uint32_t expert;
};

struct ExpertsJob {
  const uint32_t* indices;
  int rows;
  uint32_t experts;
  std::vector<Gemm> panels;  // of the first expert, for the first row: GEMM_OUTPUTS outputs each
  size_t codes, scales, bias;  // bytes from one expert to the next
  std::vector<Run> runs;       // room for as many as there are rows
};

void run_panel(void* context, int task) {
  const ExpertsJob& job = *static_cast<ExpertsJob*>(context);
  const Run& run = job.runs[task / job.panels.size()];
  Gemm g = job.panels[task % job.panels.size()];
  g.out.y = static_cast<uint8_t*>(g.out.y) + (size_t)run.first * g.y_stride * (g.out.type == FLOAT32 ? 4 : 2);
  if (run.expert >= job.experts) {
    for (int r = 0; r < run.count; ++r) {
      fill_with_nan(g.out);
      g.out.y = static_cast<uint8_t*>(g.out.y) + g.y_stride * (g.out.type == FLOAT32 ? 4 : 2);
    }
    return;
  }
  g.x += (size_t)run.first * g.x_stride;
  g.rows = run.count;
  g.weights.codes += run.expert * job.codes;
  g.weights.scales = static_cast<const uint8_t*>(g.weights.scales) + run.expert * job.scales;
  g.weights.biases = static_cast<const uint8_t*>(g.weights.biases) + run.expert * job.scales;
  if (g.out.bias) g.out.bias = static_cast<const uint8_t*>(g.out.bias) + run.expert * job.bias;
  kernels().gemm(g, thread_work());
}

void run_experts(ExpertsJob& job) {
  for (int row = 0; row < job.rows; job.runs.back().count = row - job.runs.back().first) {
    job.runs.push_back({row, 0, job.indices[row]});
    const int last = std::min(job.rows, row + GEMM_ROWS);
    while (row < last && job.indices[row] == job.runs.back().expert) ++row;
  }
  parallel(job.runs.size() * job.panels.size(), run_panel, &job);
}

class DenseExperts : public Native {
 public:
  DenseExperts(mx::Stream stream, Fallback fallback, int bits, int group_size)
      : Native(stream, std::move(fallback)), bits_(bits), group_size_(group_size) {}

  // inputs: x (rows, inputs) float32, indices, weight, scales, biases, maybe bias
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    mx::array& out = outputs[0];
    allocate(out);
    if (out.size() == 0) return;
    Arrays in;
    for (const mx::array& a : inputs) in.push_back(in_order(a, stream()));
    mx::cpu::get_command_encoder(stream()).dispatch([job = planned(in, out)]() { run_experts(*job); });
  }

  const char* name() const override { return "SpqtDenseExperts"; }

 private:
  std::shared_ptr<ExpertsJob> planned(const Arrays& in, mx::array& out) const {
    const mx::array &x = in[0], &w = in[2], &scales = in[3], &biases = in[4];
    const mx::array* bias = in.size() > 5 ? &in[5] : nullptr;
    const int inputs = x.shape(-1), outputs = out.shape(-1), band = scales.shape(-1) * group_size_;
    auto job = std::make_shared<ExpertsJob>();
    job->indices = in[1].data<uint32_t>();
    job->rows = x.shape(0);
    job->experts = w.shape(0);
    job->codes = (size_t)w.shape(1) * inputs * w.shape(-1) * 4;
    job->scales = (size_t)w.shape(1) * inputs * scales.shape(-1) * scales.itemsize();
    job->bias = bias ? outputs * bias->itemsize() : 0;
    job->runs.reserve(job->rows);
    for (int start = 0; start < outputs; start += band) {
      const size_t channels = (size_t)(start / band) * inputs;
      const size_t code_stride = (size_t)w.shape(-1) * 4, groups = scales.shape(-1);
      const Tile whole{w.data<uint8_t>() + channels * code_stride, code_stride,
                       scales.data<uint8_t>() + channels * groups * scales.itemsize(),
                       biases.data<uint8_t>() + channels * groups * scales.itemsize(), groups, type_of(scales), 0,
                       group_size_, bits_};
      for (int first = 0; first < std::min(band, outputs - start); first += GEMM_OUTPUTS) {
        const int count = std::min({GEMM_OUTPUTS, band - first, outputs - start - first}), at = start + first;
        const Output to{out.data<uint8_t>() + (size_t)at * out.itemsize(), type_of(out), count,
                        bias ? bias->data<uint8_t>() + (size_t)at * bias->itemsize() : nullptr,
                        bias ? type_of(*bias) : FLOAT32};
        job->panels.push_back({x.data<float>(), inputs, 0, inputs, whole, first, false, to, outputs});
      }
    }
    return job;
  }

  int bits_, group_size_;
};

mx::array add_bias(const mx::array& y, const Native::Arrays& in, mx::Stream s) {
  return in.size() > 4 ? mx::add(y, in[4], s) : y;
}

// MLX's own way to the same product
Native::Fallback zigzag_fallback(int outputs, int bits, int group_size, mx::Stream s) {
  return [=](const Native::Arrays& in) -> Native::Arrays {
    auto rows = mx::reshape(in[0], {1, -1, in[0].shape(-1)}, s);
    auto y = mx::quantized_matmul(rows, in[1], in[2], in[3], false, group_size, bits, "affine", s);
    y = mx::reshape(mx::swapaxes(y, 0, 1, s), {rows.shape(1), -1}, s);
    auto shape = in[0].shape();
    shape.back() = outputs;
    y = mx::slice(y, {0, 0}, {y.shape(0), outputs}, s);
    return {add_bias(mx::reshape(y, shape, s), in, s)};
  };
}

Native::Fallback experts_fallback(int outputs, int bits, int group_size, mx::Stream s) {
  return [=](const Native::Arrays& in) -> Native::Arrays {
    const int bands = in[2].shape(1);
    auto flat = [&](const mx::array& a) { return mx::flatten(a, 0, 1, s); };
    auto rows = mx::expand_dims(in[0], 1, s);
    std::vector<mx::array> parts;
    for (int b = 0; b < bands; ++b) {
      auto which = mx::add(mx::multiply(in[1], mx::array(bands, mx::uint32), s), mx::array(b, mx::uint32), s);
      parts.push_back(mx::gather_qmm(rows, flat(in[2]), flat(in[3]), flat(in[4]), std::nullopt, which, false, group_size,
                                     bits, "affine", std::nullopt, false, s));
    }
    auto y = mx::squeeze(mx::concatenate(parts, -1, s), 1, s);
    y = mx::slice(y, {0, 0}, {y.shape(0), outputs}, s);
    return {in.size() > 5 ? mx::add(y, mx::take(in[5], in[1], 0, s), s) : y};
  };
}

Native::Fallback row_fallback(int bits, int group_size, mx::Stream s) {
  return [=](const Native::Arrays& in) -> Native::Arrays {
    return {add_bias(mx::quantized_matmul(in[0], in[1], in[2], in[3], true, group_size, bits, "affine", s), in, s)};
  };
}

}  // namespace

mx::array zigzag_matmul(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& scales,
    const mx::array& biases,
    const std::optional<mx::array>& bias,
    int outputs,
    int bits,
    int group_size) {
  require(x.ndim() > 0 && is_floating(x), "x must be float32, float16 or bfloat16.");
  require_zigzag(weight, scales, biases, bias, x.shape(-1), outputs, bits, group_size);
  mx::Shape shape = x.shape();
  shape.back() = outputs;
  auto stream = cpu_stream();
  auto dense = std::make_shared<Dense>(
      stream, zigzag_fallback(outputs, bits, group_size, stream), bits, group_size, false);
  Native::Arrays in{mx::astype(x, mx::float32, stream), weight, scales, biases};
  if (bias) in.push_back(*bias);
  return mx::array(std::move(shape), x.dtype(), std::move(dense), std::move(in));
}

mx::array experts_matmul(
    const mx::array& x,
    const mx::array& indices,
    const mx::array& weight,
    const mx::array& scales,
    const mx::array& biases,
    const std::optional<mx::array>& bias,
    int outputs,
    int bits,
    int group_size) {
  require(x.ndim() == 2 && is_floating(x), "x must be (rows, inputs), float32, float16 or bfloat16.");
  require(indices.dtype() == mx::uint32 && indices.shape() == mx::Shape{x.shape(0)},
          "indices must be uint32, one for each row of x.");
  require_zigzag(weight, scales, biases, bias, x.shape(-1), outputs, bits, group_size, 4);
  auto stream = cpu_stream();
  auto dense = std::make_shared<DenseExperts>(
      stream, experts_fallback(outputs, bits, group_size, stream), bits, group_size);
  Native::Arrays in{mx::astype(x, mx::float32, stream), indices, weight, scales, biases};
  if (bias) in.push_back(*bias);
  return mx::array({x.shape(0), outputs}, x.dtype(), std::move(dense), std::move(in));
}

mx::array row_matmul(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& scales,
    const mx::array& biases,
    const std::optional<mx::array>& bias,
    int bits,
    int group_size) {
  require(x.ndim() > 0 && is_floating(x), "x must be float32, float16 or bfloat16.");
  require_rows(weight, scales, biases, bias, x.shape(-1), bits, group_size);
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  auto stream = cpu_stream();
  auto dense = std::make_shared<Dense>(stream, row_fallback(bits, group_size, stream), bits, group_size, true);
  Native::Arrays in{is_token_each(x) ? x : mx::astype(x, mx::float32, stream), weight, scales, biases};
  if (bias) in.push_back(*bias);
  return mx::array(std::move(shape), x.dtype(), std::move(dense), std::move(in));
}

}  // namespace spqt
