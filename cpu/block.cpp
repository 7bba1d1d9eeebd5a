#include "block.h"

#include "check.h"
#include "mlx/backend/cpu/encoder.h"
#include "scratch.h"
#include "step.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

using Shape = ProjectionShape;

constexpr int EACH[] = {1, 2, 1};  // projections of a tail that are counted together

// outputs: norm(x), y of each projection, counts
class Head : public OnCpu {
 public:
  Head(mx::Stream stream, float eps, std::vector<Shape> shapes, bool counted)
      : OnCpu(stream), eps_(eps), shapes_(std::move(shapes)), counted_(counted) {}

  // inputs: x, the norm's weight, arrays as SparseGemv's, then counts
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const Arrays in = ready(inputs, outputs, 0);
    const Counts counts{outputs.back().data<uint32_t>(), counted_ ? in.back().data<uint32_t>() : nullptr};
    std::vector<Place> y;
    for (size_t p = 1; p <= shapes_.size(); ++p) y.push_back({outputs[p].data<void>(), FLOAT32});
    const int rows = rows_of(in[0]).rows;
    const Norm norm{in[0].data<float>(), in[1].data<float>(), outputs[0].data<float>(), rows, in[0].shape(-1), eps_};
    auto job = plan(shapes_, {norm.y, FLOAT32, 1, rows}, {in, 2}, y, counts, stream());
    mx::cpu::get_command_encoder(stream()).dispatch([job, norm]() {
      kernels().rms_norm(norm);
      run_job(*job);
    });
  }

  const char* name() const override { return "SpqtHead"; }

 private:
  float eps_;
  std::vector<Shape> shapes_;
  bool counted_;
};

void add_to(float* y, const float* x, int n) {
  for (int i = 0; i < n; ++i) y[i] += x[i];
}

// outputs: y, counts of out, of gate and up, of down
class Tail : public OnCpu {
 public:
  // counted: which of the three counts go on from earlier ones
  Tail(mx::Stream stream, float eps, Shape out, GatedShape gated, std::vector<bool> counted)
      : OnCpu(stream), eps_(eps), out_{out}, gated_(std::move(gated)), counted_(std::move(counted)) {}

  // inputs: x, the norm's weight, attended, arrays of out, gate, up and down as SparseGemv's, counts there are
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const Arrays in = ready(inputs, outputs, 0);
    const int width = out_[0].outputs, rows = rows_of(in[0]).rows, size = rows * width;
    auto between = scratch(stream().index, BETWEEN, 2 * ((size_t)size + (size_t)rows * gated_.pair[0].outputs));
    float *h = between.get(), *normed = h + size;
    const float* x = in[0].data<float>();
    Counts counts[3];
    size_t at = in.size();
    for (int i = 2; i >= 0; --i)
      counts[i] = {outputs[i + 1].data<uint32_t>(), counted_[i] ? in[--at].data<uint32_t>() : nullptr};
    float* y = outputs[0].data<float>();
    auto first = plan(out_, rows_of(in[2]), {in, 3}, {{h, FLOAT32}}, counts[0], stream());
    auto second = plan_gated(gated_, {normed, FLOAT32, 1, rows}, {in, after(out_[0], 3)},
                             {y, normed + size, counts[1], counts[2]}, stream());
    const Norm norm{h, in[1].data<float>(), normed, rows, width, eps_};
    mx::cpu::get_command_encoder(stream()).dispatch([=]() {
      between.start();
      run_job(*first);
      add_to(h, x, size);
      kernels().rms_norm(norm);
      run_gated(second);
      add_to(y, h, size);
    });
  }

  const char* name() const override { return "SpqtTail"; }

 private:
  float eps_;
  std::vector<Shape> out_;
  GatedShape gated_;
  std::vector<bool> counted_;
};

// outputs: h, norm(h), count of out
class Middle : public OnCpu {
 public:
  Middle(mx::Stream stream, float eps, Shape out, bool counted)
      : OnCpu(stream), eps_(eps), out_{out}, counted_(counted) {}

  // inputs: x, the norm's weight, attended, arrays of out as SparseGemv's, then its count
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const Arrays in = ready(inputs, outputs, 0);
    const int width = out_[0].outputs, rows = rows_of(in[0]).rows;
    float *h = outputs[0].data<float>(), *normed = outputs[1].data<float>();
    const float* x = in[0].data<float>();
    const Counts counts{outputs[2].data<uint32_t>(), counted_ ? in.back().data<uint32_t>() : nullptr};
    auto job = plan(out_, rows_of(in[2]), {in, 3}, {{h, FLOAT32}}, counts, stream());
    const Norm norm{h, in[1].data<float>(), normed, rows, width, eps_};
    mx::cpu::get_command_encoder(stream()).dispatch([=]() {
      run_job(*job);
      add_to(h, x, rows * width);
      kernels().rms_norm(norm);
    });
  }

  const char* name() const override { return "SpqtMiddle"; }

 private:
  float eps_;
  std::vector<Shape> out_;
  bool counted_;
};

void require_norm(const mx::array& weight, int width) {
  require(weight.dtype() == mx::float32 && weight.size() == (size_t)width, "a norm's weight must be float32, (inputs,).");
}

}  // namespace

HeadStep::HeadStep(const mx::array& weight, float eps, const std::vector<Projection>& projections)
    : inputs_(inputs_of(projections)), eps_(eps), arrays_{weight} {
  require_norm(weight, inputs_);
  shapes_ = taken(projections, inputs_, arrays_);
}

std::tuple<mx::array, Arrays, mx::array> HeadStep::operator()(const mx::array& x, const Count& counted) const {
  const int rows = require_float_rows(x, inputs_);
  std::vector<mx::Shape> shapes(shapes_.size() + 1, x.shape());
  for (size_t p = 0; p < shapes_.size(); ++p) shapes[p + 1].back() = shapes_[p].outputs;
  shapes.push_back(counts_shape(shapes_.size(), rows));
  std::vector<mx::Dtype> types(shapes_.size() + 1, mx::float32);
  types.push_back(mx::uint32);
  Arrays in{x};
  in.insert(in.end(), arrays_.begin(), arrays_.end());
  add_counts(in, counted, shapes_.size(), rows);
  auto head = std::make_shared<Head>(cpu_stream(), eps_, shapes_, counted.has_value());
  auto out = mx::array::make_arrays(std::move(shapes), types, std::move(head), std::move(in));
  return {out.front(), Arrays(out.begin() + 1, out.end() - 1), out.back()};
}

TailStep::TailStep(
    const Projection& out,
    const mx::array& weight,
    float eps,
    const std::vector<Projection>& pair,
    const Projection& down)
    : inputs_(inputs_of({out})),
      eps_(eps),
      out_(taken({out}, inputs_, arrays_)[0]),
      gated_(taken_gated(pair, down, out_.outputs, arrays_)) {
  require_norm(weight, out_.outputs);
  require(gated_.down.outputs == out_.outputs, "down must be as wide as out.");
  arrays_.insert(arrays_.begin(), weight);
}

std::pair<mx::array, Arrays> TailStep::operator()(
    const mx::array& attended,
    const mx::array& x,
    const std::vector<Count>& counted) const {
  const int rows = require_float_rows(x, out_.outputs);
  require(require_float_rows(attended, inputs_) == rows, "attended and x must have as many rows.");
  require(counted.size() == 3, "three counts must be given.");
  Arrays in{x, arrays_[0], attended};
  in.insert(in.end(), arrays_.begin() + 1, arrays_.end());
  std::vector<bool> given;
  for (int i = 0; i < 3; ++i) {
    add_counts(in, counted[i], EACH[i], rows);
    given.push_back(counted[i].has_value());
  }
  auto tail = std::make_shared<Tail>(cpu_stream(), eps_, out_, gated_, std::move(given));
  auto found = mx::array::make_arrays({x.shape(), counts_shape(EACH[0], rows), counts_shape(EACH[1], rows), counts_shape(EACH[2], rows)},
                                      {mx::float32, mx::uint32, mx::uint32, mx::uint32}, std::move(tail), std::move(in));
  return {found[0], Arrays(found.begin() + 1, found.end())};
}

MiddleStep::MiddleStep(const Projection& out, const mx::array& weight, float eps)
    : inputs_(inputs_of({out})), eps_(eps), out_(taken({out}, inputs_, arrays_)[0]) {
  require_norm(weight, out_.outputs);
  arrays_.insert(arrays_.begin(), weight);
}

std::pair<std::pair<mx::array, mx::array>, Arrays> MiddleStep::operator()(
    const mx::array& attended,
    const mx::array& x,
    const std::vector<Count>& counted) const {
  const int rows = require_float_rows(x, out_.outputs);
  require(require_float_rows(attended, inputs_) == rows, "attended and x must have as many rows.");
  require(counted.size() == 1, "one count must be given.");
  Arrays in{x, arrays_[0], attended};
  in.insert(in.end(), arrays_.begin() + 1, arrays_.end());
  add_counts(in, counted[0], 1, rows);
  auto middle = std::make_shared<Middle>(cpu_stream(), eps_, out_, counted[0].has_value());
  auto found = mx::array::make_arrays({x.shape(), x.shape(), counts_shape(1, rows)}, {mx::float32, mx::float32, mx::uint32},
                                      std::move(middle), std::move(in));
  return {{found[0], found[1]}, {found[2]}};
}

}  // namespace spqt
