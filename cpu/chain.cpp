#include "chain.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <new>

#include "check.h"
#include "mlx/backend/cpu/encoder.h"
#include "scratch.h"
#include "step.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

constexpr int COUNTED = 7;  // projections of a block: q, k, v, out, gate, up, down

// One block's jobs: they read and write the plan's memory, but for x and y.
struct BlockPlan {
  Norm first, second;  // x of the first is the block's
  std::shared_ptr<Job> head, out;
  GatedJob gated;
};

// What one stream runs for each token of so many rows. Its memory holds one block's values at a time.
struct Plan {
  std::shared_ptr<float[]> memory;
  size_t size;
  int rows;
  float *normed, *q, *k, *v, *turned, *attended, *h, *down;
  std::vector<uint32_t> counts;
  std::vector<BlockPlan> blocks;
};

// What differs from token to token.
struct Token {
  const float* x;
  std::vector<float*> y;
  std::vector<TokenPlace> places;
  uint32_t* counts;
  const uint32_t* before;
};

void require_there(const Arrays& arrays) {
  for (const mx::array& a : arrays)
    require(a.is_available() && !a.is_tracer() && a.flags().row_contiguous, "weights must be available, and in order.");
}

}  // namespace

struct ChainStep::Blocks {
  std::vector<Block> all;
  int width;
  std::mutex lock;
  std::map<std::pair<int, int>, std::shared_ptr<Plan>> plans;  // by stream and rows

  std::shared_ptr<Plan> plan(mx::Stream stream, int rows) {
    std::lock_guard guard(lock);
    std::shared_ptr<Plan>& found = plans[{stream.index, rows}];
    if (!found) found = made(stream, rows);
    return found;
  }

 private:
  std::shared_ptr<Plan> made(mx::Stream stream, int rows) const {
    size_t products[3] = {}, attended = 0, middle = 0;  // the widest block's
    for (const auto& [head, token, tail] : all) {
      for (int p = 0; p < 3; ++p) products[p] = std::max<size_t>(products[p], head.shapes_[p].outputs);
      attended = std::max<size_t>(attended, tail.inputs_);
      middle = std::max<size_t>(middle, tail.gated_.pair[0].outputs);
    }
    auto plan = std::make_shared<Plan>();
    const size_t sizes[] = {(size_t)width, products[0], products[1], products[2], attended, attended,
                            (size_t)width, (size_t)width, 2 * middle};
    float** starts[] = {&plan->normed, &plan->q, &plan->k, &plan->v, &plan->turned, &plan->attended, &plan->h, &plan->down};
    constexpr std::align_val_t LINE{64};
    auto room = [&](size_t floats) { return (rows * floats + PADDING - 1) / PADDING * PADDING; };
    plan->rows = rows;
    for (size_t size : sizes) plan->size += room(size);
    plan->memory = {new (LINE) float[plan->size], [](float* p) { operator delete[](p, LINE); }};
    float* free = plan->memory.get();
    for (int i = 0; i < 8; free += room(sizes[i++])) *starts[i] = free;
    const int each = counts_of(rows);
    plan->counts.resize(COUNTED * all.size() * each);
    uint32_t* counts = plan->counts.data();
    for (const auto& [head, token, tail] : all) {
      BlockPlan block;
      block.first = {nullptr, head.arrays_[0].data<float>(), plan->normed, rows, width, head.eps_};
      block.head = spqt::plan(head.shapes_, {plan->normed, FLOAT32, 1, rows}, {head.arrays_, 1},
                              {{plan->q, FLOAT32}, {plan->k, FLOAT32}, {plan->v, FLOAT32}}, {counts, nullptr}, stream);
      block.out = spqt::plan({tail.out_}, {plan->attended, FLOAT32, 1, rows}, {tail.arrays_, 1}, {{plan->h, FLOAT32}},
                             {counts + 3 * each, nullptr}, stream);
      block.second = {plan->h, tail.arrays_[0].data<float>(), plan->normed, rows, width, tail.eps_};
      block.gated = plan_gated(tail.gated_, {plan->normed, FLOAT32, 1, rows}, {tail.arrays_, after(tail.out_, 1)},
                               {plan->down, free, {counts + 4 * each, nullptr}, {counts + 6 * each, nullptr}}, stream);
      plan->blocks.push_back(std::move(block));
      counts += COUNTED * each;
    }
    return plan;
  }
};

namespace {

void run(const std::vector<ChainStep::Block>& blocks, Plan& plan, Token& token) {
  const float* x = token.x;
  for (size_t i = 0; i < blocks.size(); ++i) {
    BlockPlan& block = plan.blocks[i];
    poison(plan.memory.get(), plan.size * sizeof(float));
    block.first.x = x;
    kernels().rms_norm(block.first);
    run_job(*block.head);
    std::get<TokenStep>(blocks[i]).run(token.places[i]);
    run_job(*block.out);
    const int size = plan.rows * block.first.width;
    for (int j = 0; j < size; ++j) plan.h[j] += x[j];
    kernels().rms_norm(block.second);
    run_gated(block.gated);
    float* y = token.y[i];
    for (int j = 0; j < size; ++j) y[j] = plan.down[j] + plan.h[j];
    x = y;
  }
  for (size_t i = 0; i < plan.counts.size(); ++i)
    token.counts[i] = plan.counts[i] + (token.before ? token.before[i] : 0);
}

// outputs: y, keys and values of each block, counts
class Chain : public OnCpu {
 public:
  // tables: where among the inputs each block's rotary positions are; none of several sequences
  Chain(mx::Stream stream, std::shared_ptr<ChainStep::Blocks> blocks, std::vector<int> places, std::vector<int> tables,
        bool counted)
      : OnCpu(stream),
        blocks_(std::move(blocks)),
        places_(std::move(places)),
        tables_(std::move(tables)),
        counted_(counted) {}

  // inputs: x, keys and values of each block, tables, or padding and mask, counts there are
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const size_t n = places_.size();
    for (size_t i = 0; i < n; ++i) allocate(outputs[i]);
    allocate(outputs.back());
    drop_inputs(inputs, outputs);
    for (size_t i = 0; i < 2 * n; ++i) take_over(inputs[1 + i], outputs[n + i]);
    const int rows = rows_of(inputs[0]).rows;
    auto plan = blocks_->plan(stream(), rows);
    Token token{in_order(inputs[0], stream()).data<float>()};
    const bool batch = tables_.empty();
    const bool* mask = batch ? in_order(inputs[1 + 3 * n], stream()).data<bool>() : nullptr;
    size_t room = 0;  // floats of the neediest attention
    for (size_t i = 0; i < n; ++i) {
      token.y.push_back(outputs[i].data<float>());
      mx::array &keys = outputs[n + i], &values = outputs[2 * n + i];
      token.places.push_back({plan->q, plan->k, plan->v, plan->turned, keys.data<float>(), values.data<float>(),
                              plan->attended, keys.shape(2), keys.shape(3), places_[i], rows,
                              batch ? nullptr : inputs[tables_[i]].data<float>(),
                              batch ? in_order(inputs[1 + 2 * n + i], stream()).data<int32_t>() : nullptr, mask});
      room = std::max(room, rows * std::get<TokenStep>(blocks_->all[i]).floats(keys.shape(3), places_[i]));
    }
    const Scratch memory = scratch(stream().index, PARTIALS, room);
    for (TokenPlace& place : token.places) place.memory = memory;
    token.counts = outputs.back().data<uint32_t>();
    token.before = counted_ ? in_order(inputs.back(), stream()).data<uint32_t>() : nullptr;
    mx::cpu::get_command_encoder(stream()).dispatch(
        [plan, blocks = blocks_, token = std::move(token)]() mutable { run(blocks->all, *plan, token); });
  }

  const char* name() const override { return "SpqtChain"; }

 private:
  std::shared_ptr<ChainStep::Blocks> blocks_;
  std::vector<int> places_, tables_;
  bool counted_;
};

}  // namespace

ChainStep::ChainStep(std::vector<Block> blocks) : blocks_(std::make_shared<Blocks>()) {
  require(!blocks.empty(), "no block was given.");
  blocks_->width = std::get<HeadStep>(blocks[0]).inputs_;
  for (auto& [head, token, tail] : blocks) {
    require(head.shapes_.size() == 3, "a block's first step must be of q, k and v.");
    require(head.inputs_ == blocks_->width && tail.out_.outputs == blocks_->width, "blocks must be of one width.");
    const int heads = head.shapes_[0].outputs / token.heads();
    require(head.shapes_[0].outputs == tail.inputs_ && tail.inputs_ == token.heads() * heads,
            "q must be whole heads, as wide as what out takes.");
    require(head.shapes_[1].outputs == token.key_heads() * heads && head.shapes_[2].outputs == head.shapes_[1].outputs,
            "k and v must be whole heads, as wide as q's.");
    require_there(head.arrays_);
    require_there(tail.arrays_);
  }
  blocks_->all = std::move(blocks);
}

bool ChainStep::takes(const mx::array& x, const Arrays& keys, const Arrays& values, const std::vector<int>& places,
                      const Batch& batch) const {
  const size_t n = blocks_->all.size();
  if (x.dtype() != mx::float32 || x.ndim() == 0 || x.shape(-1) != blocks_->width || keys.size() != n || values.size() != n ||
      places.size() != n)
    return false;
  const size_t rows = x.size() / blocks_->width;
  if (rows == 0 || rows > MOST_ROWS || (!batch && rows > 1)) return false;
  if (batch && (batch->first.size() != n || batch->second.dtype() != mx::bool_ ||
                batch->second.size() != rows * (places[0] + 1)))
    return false;
  for (size_t i = 0; i < n; ++i) {
    const auto& [head, token, tail] = blocks_->all[i];
    if (!token.takes(keys[i], values[i], places[i], rows, head.shapes_[0].outputs / token.heads())) return false;
    if (batch && (places[i] != places[0] || batch->first[i].dtype() != mx::int32 || batch->first[i].size() != rows))
      return false;
  }
  return true;
}

std::tuple<Arrays, Arrays, Arrays, mx::array> ChainStep::operator()(
    const mx::array& x,
    const Arrays& keys,
    const Arrays& values,
    const std::vector<int>& places,
    const std::optional<mx::array>& counted,
    const Batch& batch) const {
  const size_t n = blocks_->all.size();
  require(takes(x, keys, values, places, batch),
          "x must be a float32 row of each sequence, and of each block there must be a cache with room.");
  Arrays in{x}, tables;
  std::vector<mx::Shape> shapes(n, x.shape());
  std::vector<mx::Dtype> types(3 * n, mx::float32);
  std::vector<int> table_of;  // each block's, in the order of the inputs
  for (size_t i = 0; i < n && !batch; ++i) {
    const mx::array table = std::get<TokenStep>(blocks_->all[i]).table(places[i]);  // the last one again, where it serves
    if (tables.empty() || tables.back().id() != table.id()) tables.push_back(table);
    table_of.push_back(1 + 2 * n + tables.size() - 1);
  }
  if (batch) {
    tables = batch->first;
    tables.push_back(batch->second);
  }
  for (const Arrays& arrays : {keys, values}) {
    in.insert(in.end(), arrays.begin(), arrays.end());
    for (const mx::array& a : arrays) shapes.push_back(a.shape());
  }
  in.insert(in.end(), tables.begin(), tables.end());
  shapes.push_back(counts_shape(COUNTED * n, x.size() / blocks_->width));
  types.push_back(mx::uint32);
  if (counted) {
    require(counted->dtype() == mx::uint32 && counted->shape() == shapes.back(), "counts must be uint32, those of seven projections a block.");
    in.push_back(*counted);
  }
  auto chain = std::make_shared<Chain>(cpu_stream(), blocks_, places, std::move(table_of), counted.has_value());
  auto out = mx::array::make_arrays(std::move(shapes), types, std::move(chain), std::move(in));
  auto part = [&](size_t at) { return Arrays(out.begin() + at * n, out.begin() + (at + 1) * n); };
  return {part(0), part(1), part(2), out.back()};
}

}  // namespace spqt
