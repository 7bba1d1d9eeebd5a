#include "zigzag.h"

#include <algorithm>

#include "check.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/scheduler.h"
#include "scratch.h"
#include "step.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

using Shape = ProjectionShape;

class SparseGemv : public OnCpu {
 public:
  SparseGemv(mx::Stream stream, std::vector<Shape> shapes, bool counted)
      : OnCpu(stream), shapes_(std::move(shapes)), counted_(counted) {}

  // inputs: x, then of each projection weight, scales, biases and what it has of threshold and bias, then counts
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const bool one = inputs[0].size() == (size_t)inputs[0].shape(-1);
    const Arrays in = ready(inputs, outputs, one);  // a row is read by its stride, rows lie in order
    const Counts counts{outputs.back().data<uint32_t>(), counted_ ? in.back().data<uint32_t>() : nullptr};
    std::vector<Place> y;
    for (size_t p = 0; p < shapes_.size(); ++p) y.push_back({outputs[p].data<void>(), type_of(outputs[p])});
    auto job = plan(shapes_, one ? row_of(in[0]) : rows_of(in[0]), {in, 1}, y, counts, stream());
    mx::cpu::get_command_encoder(stream()).dispatch([job]() { run_job(*job); });
  }

  const char* name() const override { return "SpqtSparseGemv"; }

 private:
  std::vector<Shape> shapes_;
  bool counted_;
};

class ExpertsGemv : public OnCpu {
 public:
  ExpertsGemv(mx::Stream stream, std::vector<Shape> shapes, bool counted)
      : OnCpu(stream), shapes_(std::move(shapes)), counted_(counted) {}

  // inputs: x, indices, then as SparseGemv's
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const Arrays in = ready(inputs, outputs, 0);
    const Counts counts{outputs.back().data<uint32_t>(), counted_ ? in.back().data<uint32_t>() : nullptr};
    std::vector<Place> y;
    for (size_t p = 0; p < shapes_.size(); ++p) y.push_back({outputs[p].data<void>(), type_of(outputs[p])});
    const Chosen chosen{in[1].data<uint32_t>(), (int)in[1].size()};
    auto job = plan(shapes_, rows_of(in[0]), {in, 2}, y, counts, stream(), &chosen);
    mx::cpu::get_command_encoder(stream()).dispatch([job]() { run_job(*job); });
  }

  const char* name() const override { return "SpqtExpertsGemv"; }

 private:
  std::vector<Shape> shapes_;
  bool counted_;
};

// down(silu(gate) * up); outputs: y, active of gate and up, active of down
class GatedGemv : public OnCpu {
 public:
  GatedGemv(mx::Stream stream, GatedShape shape, bool counted, bool counted_down)
      : OnCpu(stream), shape_(std::move(shape)), counted_(counted), counted_down_(counted_down) {}

  // inputs: x, arrays of gate, up and down as SparseGemv's, then the counts there are
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const Arrays in = ready(inputs, outputs, 0);
    const Row x = rows_of(in[0]);
    auto between = scratch(stream().index, BETWEEN, (size_t)2 * x.rows * shape_.pair[0].outputs);
    const uint32_t* before = counted_ ? in[in.size() - 1 - counted_down_].data<uint32_t>() : nullptr;
    const uint32_t* before_down = counted_down_ ? in.back().data<uint32_t>() : nullptr;
    const GatedPlaces places{outputs[0].data<float>(), between.get(), {outputs[1].data<uint32_t>(), before},
                             {outputs[2].data<uint32_t>(), before_down}};
    auto job = plan_gated(shape_, x, {in, 1}, places, stream());
    mx::cpu::get_command_encoder(stream()).dispatch([job, between]() {
      between.start();
      run_gated(job);
    });
  }

  const char* name() const override { return "SpqtGatedGemv"; }

 private:
  GatedShape shape_;
  bool counted_, counted_down_;
};

}  // namespace

Arrays OnCpu::ready(const Arrays& inputs, Arrays& outputs, size_t first) {
  for (auto& output : outputs) allocate(output);
  Arrays in(inputs.begin(), inputs.begin() + first);
  for (size_t i = first; i < inputs.size(); ++i) in.push_back(in_order(inputs[i], stream()));
  return in;
}

void OnCpu::drop_inputs(const Arrays& inputs, Arrays& outputs) {
  for (auto& output : outputs)
    if (&output.inputs() != &inputs && !output.is_tracer()) output.inputs().clear();
}

void OnCpu::take_over(const mx::array& in, mx::array& out) {
  // The step before holds its cache until it has run, which it will have before this one does.
  while (!in.is_donatable() && mx::scheduler::n_active_tasks() > 1) mx::scheduler::wait_for_one();
  if (!in.is_donatable()) mx::synchronize(stream());
  if (in.is_donatable() && in.flags().row_contiguous && in.data_size() == in.size()) {
    out.copy_shared_buffer(in);
    return;
  }
  allocate(out);
  const mx::array from = in_order(in, stream());
  mx::cpu::get_command_encoder(stream()).dispatch(
      [from = from.data<float>(), to = out.data<float>(), n = out.size()]() { std::copy(from, from + n, to); });
}

GatedJob plan_gated(const GatedShape& shape, const Row& x, const Operands& in, const GatedPlaces& places,
                    mx::Stream stream) {
  const int middle = x.rows * shape.pair[0].outputs;
  float *gate = places.between, *up = gate + middle;
  const size_t of_down = after(shape.pair[1], after(shape.pair[0], in.at));
  auto pair = plan(shape.pair, x, in, {{gate, FLOAT32}, {up, FLOAT32}}, places.pair, stream);
  auto down = plan({shape.down}, {gate, FLOAT32, 1, x.rows}, {in.arrays, of_down}, {{places.y, FLOAT32}}, places.down, stream);
  return {pair, down, gate, up, middle};
}

void run_gated(const GatedJob& job) {
  run_job(*job.pair);
  kernels().gate(job.gate, job.up, job.middle);
  run_job(*job.down);
}

// Checks projections and appends their arrays; returns their shapes.
std::vector<Shape> taken(const std::vector<Projection>& projections, int inputs, Arrays& arrays, int ndim) {
  std::vector<Shape> shapes;
  for (const auto& [weight, scales, biases, threshold, bias, outputs, bits, group_size] : projections) {
    require_zigzag(weight, scales, biases, bias, inputs, outputs, bits, group_size, ndim);
    require(!threshold || (threshold->dtype() == mx::float32 &&
                           (threshold->size() == 1 || threshold->size() == (size_t)inputs)),
            "threshold must be float32, (1,) or (inputs,).");
    arrays.insert(arrays.end(), {weight, scales, biases});
    if (threshold) arrays.push_back(*threshold);
    if (bias) arrays.push_back(*bias);
    shapes.push_back({outputs, bits, group_size, threshold.has_value(), bias.has_value()});
  }
  return shapes;
}

int inputs_of(const std::vector<Projection>& projections, int ndim) {
  require(!projections.empty(), "no projection was given.");
  const mx::array& weight = std::get<0>(projections[0]);
  require((int)weight.ndim() == ndim, "weight must be 3-D, of experts 4-D.");
  return weight.shape(-2);
}

int require_rows(const mx::array& x, int inputs) {
  require(x.ndim() > 0 && is_floating(x), "x must be float32, float16 or bfloat16.");
  require(x.shape(-1) > 0 && x.size() > 0 && x.size() / x.shape(-1) <= MOST_ROWS, "x must be 1 to 64 rows.");
  require_inputs(x.shape(-1), inputs);
  return x.size() / x.shape(-1);
}

int require_float_rows(const mx::array& x, int inputs) {
  const int rows = require_rows(x, inputs);
  require(x.dtype() == mx::float32, "x must be float32.");
  return rows;
}

mx::Shape counts_shape(int projections, int rows) {
  return rows == 1 ? mx::Shape{projections} : mx::Shape{projections, counts_of(rows)};
}

void add_counts(Arrays& in, const Count& counted, int projections, int rows) {
  if (!counted) return;
  require(counted->dtype() == mx::uint32 && counted->shape() == counts_shape(projections, rows),
          "counts must be uint32, of each projection those of its rows.");
  in.push_back(*counted);
}

SparseStep::SparseStep(const std::vector<Projection>& projections) : inputs_(inputs_of(projections)) {
  shapes_ = taken(projections, inputs_, arrays_);
}

std::pair<Arrays, mx::array> SparseStep::operator()(const mx::array& x, const std::optional<mx::array>& counted) const {
  const int rows = require_rows(x, inputs_), projections = shapes_.size();
  std::vector<mx::Shape> shapes(projections, x.shape());
  for (int p = 0; p < projections; ++p) shapes[p].back() = shapes_[p].outputs;
  shapes.push_back(counts_shape(projections, rows));
  std::vector<mx::Dtype> types(shapes_.size(), x.dtype());
  types.push_back(mx::uint32);
  Arrays in{x};
  in.insert(in.end(), arrays_.begin(), arrays_.end());
  add_counts(in, counted, projections, rows);
  auto primitive = std::make_shared<SparseGemv>(cpu_stream(), shapes_, counted.has_value());
  auto out = mx::array::make_arrays(std::move(shapes), types, std::move(primitive), std::move(in));
  mx::array active = out.back();
  out.pop_back();
  return {std::move(out), std::move(active)};
}

ExpertsStep::ExpertsStep(const std::vector<Projection>& projections) : inputs_(inputs_of(projections, 4)) {
  shapes_ = taken(projections, inputs_, arrays_, 4);
}

std::pair<Arrays, mx::array> ExpertsStep::operator()(const mx::array& x, const mx::array& indices,
                                                     const std::optional<mx::array>& counted) const {
  require(x.ndim() > 0 && is_floating(x), "x must be float32, float16 or bfloat16.");
  require_inputs(x.shape(-1), inputs_);
  require(indices.dtype() == mx::uint32, "indices must be uint32.");
  const size_t rows = x.size() / inputs_, pairs = indices.size();
  require(rows > 0 && pairs > 0 && pairs <= MOST_CHOSEN && pairs % rows == 0,
          "there must be 1 to 512 indices, as many for each row of x.");
  const int projections = shapes_.size();
  std::vector<mx::Shape> shapes;
  for (const Shape& s : shapes_) {
    shapes.push_back(indices.shape());
    shapes.back().insert(shapes.back().end(), {1, s.outputs});
  }
  shapes.push_back(counts_shape(projections, 1));
  std::vector<mx::Dtype> types(projections, x.dtype());
  types.push_back(mx::uint32);
  Arrays in{x, indices};
  in.insert(in.end(), arrays_.begin(), arrays_.end());
  add_counts(in, counted, projections, 1);
  auto primitive = std::make_shared<ExpertsGemv>(cpu_stream(), shapes_, counted.has_value());
  auto out = mx::array::make_arrays(std::move(shapes), types, std::move(primitive), std::move(in));
  mx::array active = out.back();
  out.pop_back();
  return {std::move(out), std::move(active)};
}

GatedShape taken_gated(const std::vector<Projection>& pair, const Projection& down, int inputs, Arrays& arrays) {
  require(pair.size() == 2, "gate and up must be given.");
  auto shapes = taken(pair, inputs, arrays);
  require(shapes[0].outputs == shapes[1].outputs, "gate and up must be of one size.");
  const Shape last = taken({down}, shapes[0].outputs, arrays)[0];
  return {std::move(shapes), last};
}

GatedStep::GatedStep(const std::vector<Projection>& pair, const Projection& down)
    : inputs_(inputs_of(pair)), shape_(taken_gated(pair, down, inputs_, arrays_)) {}

std::tuple<mx::array, mx::array, mx::array> GatedStep::operator()(
    const mx::array& x,
    const std::optional<mx::array>& counted,
    const std::optional<mx::array>& counted_down) const {
  const int rows = require_float_rows(x, inputs_);
  mx::Shape shape = x.shape();
  shape.back() = shape_.down.outputs;
  Arrays in{x};
  in.insert(in.end(), arrays_.begin(), arrays_.end());
  add_counts(in, counted, 2, rows);
  add_counts(in, counted_down, 1, rows);
  auto out = mx::array::make_arrays(
      {shape, counts_shape(2, rows), counts_shape(1, rows)}, {mx::float32, mx::uint32, mx::uint32},
      std::make_shared<GatedGemv>(cpu_stream(), shape_, counted.has_value(), counted_down.has_value()),
      std::move(in));
  return {out[0], out[1], out[2]};
}

}  // namespace spqt
