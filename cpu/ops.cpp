#include "ops.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "native.h"
#include "pool.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

// Rows or heads that are worth a task of their own.
constexpr int64_t TASK_FLOATS = 16 * 1024;

struct NormJob {
  Norm all;
  int rows_per_task, tasks;
};

void run_norm(void* context, int task) {
  const NormJob& job = *static_cast<NormJob*>(context);
  Norm part = job.all;
  const int first = task * job.rows_per_task;
  part.x += (int64_t)first * part.width;
  part.y += (int64_t)first * part.width;
  part.rows = std::min(job.rows_per_task, job.all.rows - first);
  kernels().rms_norm(part);
}

class RmsNorm : public Native {
 public:
  RmsNorm(mx::Stream stream, Fallback fallback, float eps) : Native(stream, std::move(fallback)), eps_(eps) {}

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const int width = in[0].shape(-1), rows = in[0].size() / width;
    allocate(out[0]);
    const mx::array x = in_order(in[0], stream());
    const float* weight = in.size() > 1 ? in_order(in[1], stream()).data<float>() : nullptr;
    NormJob job{{x.data<float>(), weight, out[0].data<float>(), rows, width, eps_},
                std::max<int>(1, TASK_FLOATS / width), 0};
    job.tasks = (rows + job.rows_per_task - 1) / job.rows_per_task;
    mx::cpu::get_command_encoder(stream()).dispatch([job]() mutable { parallel(job.tasks, run_norm, &job); });
  }

  const char* name() const override { return "SpqtRmsNorm"; }

 private:
  float eps_;
};

class Swiglu : public Native {
 public:
  using Native::Native;

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const mx::array gate = in_order(in[0], stream()), up = in_order(in[1], stream());
    allocate(out[0]);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [job = Parts{gate.data<float>(), up.data<float>(), out[0].data<float>(), (int64_t)gate.size()}]() mutable {
          parallel((job.size + TASK_FLOATS - 1) / TASK_FLOATS, run_part, &job);
        });
  }

  const char* name() const override { return "SpqtSwiglu"; }

 private:
  struct Parts {
    const float *gate, *up;
    float* y;
    int64_t size;
  };

  static void run_part(void* context, int part) {
    const Parts& job = *static_cast<Parts*>(context);
    const int64_t first = part * TASK_FLOATS;
    const int n = std::min(TASK_FLOATS, job.size - first);
    std::copy_n(job.gate + first, n, job.y + first);
    kernels().gate(job.y + first, job.up + first, n);
  }
};

// What sums over the last axis, or over all, leave of a shape.
mx::Shape summed(const mx::Shape& shape, bool last, bool keepdims) {
  mx::Shape left(last ? shape.begin() : shape.end(), last ? shape.end() - 1 : shape.end());
  if (keepdims) left.resize(shape.size(), 1);
  return left;
}

class LogSumExp : public Native {
 public:
  LogSumExp(mx::Stream stream, Fallback fallback, bool last, bool keepdims)
      : Native(stream, std::move(fallback)), last_(last), keepdims_(keepdims) {}

  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {summed(in[0].shape(), last_, keepdims_)};
  }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    const mx::array x = in_order(in[0], stream());
    allocate(out[0]);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [job = Runs{x.data<float>(), out[0].data<float>(), (int)(x.size() / out[0].size())},
         runs = (int)out[0].size()]() mutable { parallel(runs, run_one, &job); });
  }

  const char* name() const override { return "SpqtLogSumExp"; }

 private:
  struct Runs {
    const float* x;
    float* y;
    int n;
  };

  static void run_one(void* context, int run) {
    const Runs& job = *static_cast<Runs*>(context);
    float largest, sum;
    kernels().sum_exp(job.x + (int64_t)run * job.n, job.n, &largest, &sum);
    job.y[run] = std::isinf(largest) ? largest : largest + std::log(sum);
  }

  bool last_, keepdims_;
};

struct RopeJob {
  Rope first;  // of the first head
  int64_t batch_stride, head_stride;
  int batch, heads;
  int64_t table_stride;  // from one sequence's to the next
};

void run_rope(void* context, int task) {
  const RopeJob& job = *static_cast<RopeJob*>(context);
  Rope one = job.first;
  one.x += task / job.heads * job.batch_stride + task % job.heads * job.head_stride;
  one.y += (int64_t)task * one.positions * one.width;
  one.table += task / job.heads * job.table_stride;
  kernels().rope(one);
}

class RotaryPositions : public Native {
 public:
  RotaryPositions(mx::Stream stream, Fallback fallback, RopeForm form)
      : Native(stream, std::move(fallback)), form_(std::move(form)) {}

  // inputs: x with its last axis in order, then the table, or the offset of each sequence
  void eval_cpu(const Arrays& in, Arrays& out) override {
    const mx::array x = in_order(in[0], stream(), 1);
    allocate(out[0]);
    const bool given = in[1].dtype() == mx::float32;
    const mx::array second = in_order(in[1], stream());
    RopeJob job{{x.data<float>(), out[0].data<float>(), x.strides(2), x.shape(3),
                 given ? second.data<float>() : nullptr, x.shape(2), form_.dims / 2, x.shape(3), form_.traditional},
                x.strides(0), x.strides(1), x.shape(0), x.shape(1), given ? 0 : (int64_t)x.shape(2) * form_.dims};
    const int32_t* offsets = given ? nullptr : second.data<int32_t>();
    mx::cpu::get_command_encoder(stream()).dispatch([job, offsets, form = form_]() mutable {
      if (offsets) job.first.table = rope_turns(form, offsets, job.batch, job.first.positions);
      const int tasks = job.batch * job.heads;
      if ((int64_t)tasks * job.first.positions * job.first.width > TASK_FLOATS)
        return parallel(tasks, run_rope, &job);
      for (int task = 0; task < tasks; ++task) run_rope(&job, task);
    });
  }

  const char* name() const override { return "SpqtRope"; }

 private:
  RopeForm form_;
};

// Cosines and sines of some positions, as rope_table has them. In float32 as MLX computes them.
void turn(const RopeForm& form, int offset, int positions, float* values) {
  const int half = form.dims / 2;
  for (int i = 0; i < half; ++i) {
    const float frequency =
        form.freqs.empty() ? (float)std::pow((double)form.base, -(double)i / half) : 1 / form.freqs[i];
    for (int p = 0; p < positions; ++p) {
      const float angle = (float)(offset + p) * form.scale * frequency;
      values[(size_t)p * 2 * half + i] = std::cos(angle);
      values[(size_t)p * 2 * half + half + i] = std::sin(angle);
    }
  }
}

}  // namespace

RopeForm rope_form(
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    const std::optional<mx::array>& freqs) {
  require(dims > 0 && dims % 2 == 0, "dims must be positive and even.");
  require(base.has_value() != freqs.has_value(), "one of base and freqs must be given.");
  require(!freqs || (freqs->is_available() && freqs->dtype() == mx::float32 && freqs->flags().row_contiguous &&
                     freqs->size() == (size_t)dims / 2),
          "freqs must be float32, evaluated, (dims / 2,).");
  RopeForm form{dims, traditional, base.value_or(0), scale, {}};
  if (freqs) form.freqs.assign(freqs->data<float>(), freqs->data<float>() + dims / 2);
  return form;
}

// All layers of a step ask for the same, here and below.
mx::array rope_table(const RopeForm& form, int offset, int positions) {
  struct Key {
    RopeForm form;
    int offset, positions;
  };
  static thread_local Key last{};
  static thread_local std::optional<mx::array> table;
  if (table && offset == last.offset && positions == last.positions && form == last.form) return *table;
  std::vector<float> values((size_t)positions * form.dims);
  turn(form, offset, positions, values.data());
  table = mx::array(values.begin(), {positions, form.dims}, mx::float32);
  last = {form, offset, positions};
  return *table;
}

const float* rope_turns(const RopeForm& form, const int32_t* offsets, int sequences, int positions) {
  struct Key {
    RopeForm form;
    std::vector<int32_t> offsets;
    int positions;
    bool operator==(const Key&) const = default;
  };
  static thread_local Key last{};
  static thread_local std::vector<float> values;
  Key key{form, {offsets, offsets + sequences}, positions};
  if (key == last) return values.data();
  values.resize((size_t)sequences * positions * form.dims);
  for (int i = 0; i < sequences; ++i)
    turn(form, offsets[i], positions, values.data() + (size_t)i * positions * form.dims);
  last = std::move(key);
  return values.data();
}

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps) {
  require(x.ndim() > 0 && x.size() > 0 && x.dtype() == mx::float32, "x must be float32.");
  require(!weight || (weight->dtype() == mx::float32 && weight->size() == (size_t)x.shape(-1)),
          "weight must be float32 and as wide as x.");
  auto stream = cpu_stream();
  auto fallback = [eps, stream](const Native::Arrays& in) -> Native::Arrays {
    auto w = in.size() > 1 ? std::optional(in[1]) : std::nullopt;
    return {mx::fast::rms_norm(in[0], w, eps, stream)};
  };
  Native::Arrays in{x};
  if (weight) in.push_back(*weight);
  return mx::array(x.shape(), x.dtype(), std::make_shared<RmsNorm>(stream, fallback, eps), std::move(in));
}

mx::array swiglu(const mx::array& gate, const mx::array& up) {
  require(gate.size() > 0 && gate.shape() == up.shape() && gate.dtype() == mx::float32 && up.dtype() == mx::float32,
          "gate and up must be float32, of one shape and not empty.");
  auto stream = cpu_stream();
  auto fallback = [stream](const Native::Arrays& in) -> Native::Arrays {
    auto silu = mx::multiply(in[0], mx::sigmoid(in[0], stream), stream);
    return {mx::multiply(silu, in[1], stream)};
  };
  return mx::array(gate.shape(), mx::float32, std::make_shared<Swiglu>(stream, fallback), {gate, up});
}

mx::array log_sum_exp(const mx::array& x, bool last, bool keepdims) {
  require(x.ndim() > 0 && x.size() > 0 && x.size() < (1u << 31) && x.dtype() == mx::float32,
          "x must be float32 and not empty.");
  auto stream = cpu_stream();
  auto fallback = [last, keepdims, stream](const Native::Arrays& in) -> Native::Arrays {
    return {last ? mx::logsumexp(in[0], -1, keepdims, stream) : mx::logsumexp(in[0], keepdims, stream)};
  };
  return mx::array(summed(x.shape(), last, keepdims), mx::float32,
                   std::make_shared<LogSumExp>(stream, fallback, last, keepdims), {x});
}

mx::array rope(
    const mx::array& x,
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    const std::variant<int, mx::array>& offset,
    const std::optional<mx::array>& freqs) {
  require(x.ndim() == 4 && x.size() > 0 && x.dtype() == mx::float32, "x must be 4-D and float32.");
  const RopeForm form = rope_form(dims, traditional, base, scale, freqs);
  require(dims <= x.shape(3), "dims must be no wider than x.");
  auto stream = cpu_stream();
  const auto* offsets = std::get_if<mx::array>(&offset);
  require(!offsets || (offsets->dtype() == mx::int32 && offsets->size() == (size_t)x.shape(0)),
          "offsets must be int32, one of each sequence.");
  auto fallback = [=](const Native::Arrays& in) -> Native::Arrays {
    auto turned = [&](const auto& from) {
      return mx::fast::rope(in[0], dims, traditional, base, scale, from, freqs, stream);
    };
    return {offsets ? turned(in[1]) : turned(std::get<int>(offset))};
  };
  auto native = std::make_shared<RotaryPositions>(stream, fallback, form);
  mx::array second = offsets ? *offsets : rope_table(form, std::get<int>(offset), x.shape(2));
  return mx::array(x.shape(), x.dtype(), std::move(native), {x, std::move(second)});
}

}  // namespace spqt
