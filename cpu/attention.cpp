#include <algorithm>
#include <cmath>

#include "check.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "native.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"
#include "step.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

// The keys that a sequence's one row sees, in the order of their tokens.
struct Seen {
  int first = 0, count = 0;
  std::vector<int32_t> places;  // empty where they lie side by side from `first` on
};

struct AttentionJob {
  Scratch memory;
  Attend first;  // of the first head
  int64_t q_batch, q_head, k_batch, k_head, v_batch, v_head;
  int heads, key_heads, rows, splits, row_tasks;
  bool causal;
  float* y;
  int tasks;
  std::vector<Seen> seen;  // by sequence, of one row a head; empty: every key
};

// What a mask says of some sequences, which is known when the job runs.
struct Mask {
  const bool* data;  // (keys,) of each; nullptr: all are seen
  int64_t stride;    // from one sequence's to the next; 0: one for all
  int keys, oldest;  // oldest: where the keys' order begins, in a cache that goes round
};

Seen seen_of(const Mask& mask, int sequence) {
  const bool* visible = mask.data ? mask.data + sequence * mask.stride : nullptr;
  Seen seen;
  for (int i = 0, key = mask.oldest; i < mask.keys; ++i, key = key + 1 == mask.keys ? 0 : key + 1)
    if (!visible || visible[key]) seen.places.push_back(key);
  seen.count = seen.places.size();
  if (!seen.count) return seen;
  seen.first = seen.places.front();
  if (seen.places.back() - seen.first == seen.count - 1 &&
      std::is_sorted(seen.places.begin(), seen.places.end()))
    seen.places.clear();
  return seen;
}

Attend head_of(const AttentionJob& job, int batch, int head) {
  const int key_head = head / (job.heads / job.key_heads);
  Attend a = job.first;
  a.q += batch * job.q_batch + head * job.q_head;
  a.k += batch * job.k_batch + key_head * job.k_head;
  a.v += batch * job.v_batch + key_head * job.v_head;
  return a;
}

// Many rows: a task is a block of rows of one head, the last (longest) blocks first.
void run_rows(void* context, int task) {
  const AttentionJob& job = *static_cast<AttentionJob*>(context);
  const int index = job.tasks - 1 - task, block = index / (job.tasks / job.row_tasks);
  const int which = index % (job.tasks / job.row_tasks), batch = which / job.heads, head = which % job.heads;
  const int row = block * ATTEND_ROWS;
  Attend a = head_of(job, batch, head);
  float top[ATTEND_ROWS], sum[ATTEND_ROWS];
  a.q += row * a.q_stride;
  a.rows = std::min(ATTEND_ROWS, job.rows - row);
  a.visible = job.causal ? a.keys - job.rows + row + 1 : a.keys;
  a.visible_step = job.causal;
  a.y = job.y + (((int64_t)batch * job.heads + head) * job.rows + row) * a.width;
  a.y_stride = a.width;
  a.top = top;
  a.sum = sum;
  kernels().attend_many(a, thread_work());
}

// One row a head: a task is a stretch of keys for all heads that share them.
void run_split(void* context, int task) {
  const AttentionJob& job = *static_cast<AttentionJob*>(context);
  const int split = task % job.splits, group = task / job.splits, shared = job.heads / job.key_heads;
  const int sequence = group / job.key_heads, first = split * SPLIT_KEYS;
  Attend a = head_of(job, sequence, group % job.key_heads * shared);
  a.q_stride = job.q_head;
  a.rows = shared;
  int64_t from = first;
  if (!job.seen.empty()) {
    const Seen& seen = job.seen[sequence];
    if (first >= seen.count) return;
    a.keys = seen.count;
    a.places = seen.places.empty() ? nullptr : seen.places.data() + first;
    from = a.places ? 0 : seen.first + first;
  }
  a.k += from * a.k_stride;
  a.v += from * a.v_stride;
  a.visible = a.keys = std::min(SPLIT_KEYS, a.keys - first);
  float* part = job.memory.get() + (int64_t)task * shared * (a.width + 2);
  a.top = part;
  a.sum = part + shared;
  a.y = part + 2 * shared;
  a.y_stride = a.width;
  kernels().attend_few(a, thread_work());
}

// The stretches of one row together, in the order of the keys; zeros for a row that sees none.
void join_splits(const AttentionJob& job, int row) {
  const int shared = job.heads / job.key_heads, width = job.first.width, lane = row % shared;
  const int keys = job.seen.empty() ? job.first.keys : job.seen[row / job.heads].count;
  const int splits = (keys + SPLIT_KEYS - 1) / SPLIT_KEYS;
  const float* parts = job.memory.get() + (int64_t)(row / shared) * job.splits * shared * (width + 2);
  const int64_t size = (int64_t)shared * (width + 2);
  float* y = job.y + (int64_t)row * width;
  std::fill(y, y + width, 0.0f);
  if (!splits) return;
  float top = parts[lane], sum = 0;
  for (int s = 1; s < splits; ++s) top = std::max(top, parts[s * size + lane]);
  for (int s = 0; s < splits; ++s) {
    const float* part = parts + s * size;
    const float factor = std::exp(part[lane] - top);
    sum += factor * part[shared + lane];
    for (int d = 0; d < width; ++d) y[d] += factor * part[2 * shared + lane * width + d];
  }
  for (int d = 0; d < width; ++d) y[d] /= sum;
}

void run_token(AttentionJob& job) {
  job.memory.start();
  parallel(job.tasks, run_split, &job);
  for (int row = 0; row < job.tasks / job.splits * (job.heads / job.key_heads); ++row) join_splits(job, row);
}

void see(AttentionJob& job, const Mask& mask, int sequences) {
  for (int i = 0; i < sequences; ++i) job.seen.push_back(seen_of(mask, i));
}

class Attention : public Native {
 public:
  Attention(mx::Stream stream, Fallback fallback, float scale, bool causal, int oldest)
      : Native(stream, std::move(fallback)), scale_(scale), causal_(causal), oldest_(oldest) {}

  // inputs: q, k, v, and of one row a head maybe a mask
  void eval_cpu(const Arrays& in, Arrays& out) override {
    allocate(out[0]);
    const int sequences = in[0].shape(0), keys = in[1].shape(2);
    std::optional<Mask> mask;
    if (oldest_) mask = {nullptr, 0, keys, oldest_};
    if (in.size() > 3) {
      const mx::array visible = in_order(in[3], stream());
      mask = {visible.data<bool>(), visible.size() == (size_t)keys ? 0 : keys, keys, oldest_};
    }
    mx::cpu::get_command_encoder(stream()).dispatch([job = plan(in, out[0]), mask, sequences]() mutable {
      if (job.rows > 1) return parallel(job.tasks, run_rows, &job);
      if (mask) see(job, *mask, sequences);
      run_token(job);
    });
  }

  const char* name() const override { return "SpqtAttention"; }

 private:
  AttentionJob plan(const Arrays& in, mx::array& out) {
    const mx::array q = in_order(in[0], stream(), 1), k = in_order(in[1], stream(), 1),
                    v = in_order(in[2], stream(), 1);
    AttentionJob job{};
    const int batch = q.shape(0), width = q.shape(3);
    job.first = {q.data<float>(), k.data<float>(), v.data<float>(), q.strides(2), k.strides(2), v.strides(2), 0,
                 k.shape(2), width, scale_, 0, 0, nullptr, 0, nullptr, nullptr};
    job.q_batch = q.strides(0), job.q_head = q.strides(1);
    job.k_batch = k.strides(0), job.k_head = k.strides(1);
    job.v_batch = v.strides(0), job.v_head = v.strides(1);
    job.heads = q.shape(1), job.key_heads = k.shape(1), job.rows = q.shape(2);
    job.causal = causal_;
    job.y = out.data<float>();
    job.row_tasks = (job.rows + ATTEND_ROWS - 1) / ATTEND_ROWS;
    job.splits = (k.shape(2) + SPLIT_KEYS - 1) / SPLIT_KEYS;
    job.tasks = job.rows > 1 ? batch * job.heads * job.row_tasks : batch * job.key_heads * job.splits;
    if (job.rows == 1)
      job.memory = scratch(stream().index, PARTIALS, (size_t)batch * job.heads * job.splits * (width + 2));
    return job;
  }

  float scale_;
  bool causal_;
  int oldest_;
};

bool is_width(int width, const RopeForm& form) {
  return width > 0 && width % 16 == 0 && width <= ATTEND_WIDTH && form.dims <= width;
}

AttentionJob job_of(const TokenPlace& t, int heads, int key_heads, float scale) {
  AttentionJob job{};
  const int width = t.width;
  job.first = {t.turned, t.keys, t.values, width, width, width, 0, t.place + 1, width, scale, 0, 0, nullptr, 0, nullptr, nullptr};
  job.q_head = width, job.k_head = job.v_head = (int64_t)t.room * width;
  job.q_batch = heads * job.q_head, job.k_batch = job.v_batch = key_heads * job.k_head;
  job.heads = heads, job.key_heads = key_heads, job.rows = 1;
  job.splits = (t.place + SPLIT_KEYS) / SPLIT_KEYS;
  job.tasks = t.sequences * key_heads * job.splits;
  job.y = t.y;
  job.memory = t.memory;
  return job;
}

// the tokens' queries, turned, and their keys, turned, and values in their places
void join_cache(const AttentionJob& job, const TokenPlace& t, const RopeForm& form) {
  const int width = t.width, half = form.dims / 2;
  for (int s = 0; s < t.sequences; ++s) {
    Rope rope{t.q + s * job.q_batch, t.turned + s * job.q_batch, 0, 0, t.table + (int64_t)s * 2 * half, 1, half, width,
              form.traditional};
    for (int head = 0; head < job.heads; ++head, rope.x += width, rope.y += width) kernels().rope(rope);
    for (int head = 0; head < job.key_heads; ++head) {
      const int64_t from = (int64_t)(s * job.key_heads + head) * width;
      const int64_t to = s * job.k_batch + head * job.k_head + (int64_t)t.place * width;
      rope.x = t.k + from;
      rope.y = t.keys + to;
      kernels().rope(rope);
      std::copy_n(t.v + from, width, t.values + to);
    }
  }
}

// One token of each sequence: rotary positions, its keys and values into the cache, then attention.
class TokenAttention : public OnCpu {
 public:
  TokenAttention(mx::Stream stream, TokenStep step, int place)
      : OnCpu(stream), step_(std::move(step)), place_(place) {}

  // inputs: q, k, v, keys, values, then the table, or padding and mask; outputs: as q, keys, values
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    allocate(outputs[0]);
    drop_inputs(inputs, outputs);
    for (int i = 1; i <= 2; ++i) take_over(inputs[2 + i], outputs[i]);
    Arrays in;
    for (size_t i : {0, 1, 2, 5, 6})
      if (i < inputs.size()) in.push_back(in_order(inputs[i], stream()));
    const int sequences = outputs[1].shape(0), room = outputs[1].shape(2), width = outputs[1].shape(3);
    auto between = scratch(stream().index, BETWEEN, (size_t)sequences * step_.heads() * width);
    TokenPlace place{in[0].data<float>(), in[1].data<float>(), in[2].data<float>(), between.get(),
                     outputs[1].data<float>(), outputs[2].data<float>(), outputs[0].data<float>(), room, width, place_, sequences};
    place.memory = scratch(stream().index, PARTIALS, sequences * step_.floats(width, place_));
    if (inputs.size() == 6) place.table = in[3].data<float>();
    else place.padding = in[3].data<int32_t>(), place.mask = in[4].data<bool>();
    mx::cpu::get_command_encoder(stream()).dispatch([place, between, step = step_]() {
      between.start();
      step.run(place);
    });
  }

  const char* name() const override { return "SpqtTokenAttention"; }

 private:
  TokenStep step_;
  int place_;
};

}  // namespace

TokenStep::TokenStep(int heads, int key_heads, float scale, RopeForm form)
    : heads_(heads), key_heads_(key_heads), scale_(scale), form_(std::move(form)) {
  require(heads > 0 && key_heads > 0 && heads % key_heads == 0, "the heads of q and k do not fit.");
}

bool TokenStep::takes(const mx::array& keys, const mx::array& values, int place, int sequences, int width) const {
  return keys.dtype() == mx::float32 && values.dtype() == mx::float32 && keys.ndim() == 4 && keys.shape(0) == sequences &&
      keys.shape(1) == key_heads_ && keys.shape(3) == width && keys.shape() == values.shape() && is_width(width, form_) &&
      place >= 0 && place < keys.shape(2);
}

size_t TokenStep::floats(int width, int place) const {
  return (size_t)heads_ * ((place + SPLIT_KEYS) / SPLIT_KEYS) * (width + 2);
}

mx::array TokenStep::table(int place) const { return rope_table(form_, place, 1); }

void TokenStep::run(TokenPlace place) const {
  AttentionJob job = job_of(place, heads_, key_heads_, scale_);
  if (place.padding) {
    std::vector<int32_t> positions(place.sequences);
    for (int s = 0; s < place.sequences; ++s) positions[s] = place.place - place.padding[s];
    place.table = rope_turns(form_, positions.data(), place.sequences, 1);
    see(job, {place.mask, place.place + 1, place.place + 1, 0}, place.sequences);
  }
  join_cache(job, place, form_);
  run_token(job);
}

std::tuple<mx::array, mx::array, mx::array> TokenStep::operator()(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& keys,
    const mx::array& values,
    int place,
    const std::optional<mx::array>& padding,
    const std::optional<mx::array>& mask) const {
  for (const mx::array& a : {q, k, v, keys, values}) require(a.dtype() == mx::float32, "all must be float32.");
  require(keys.ndim() == 4 && keys.shape() == values.shape() && keys.shape(1) == key_heads_,
          "keys and values must be (sequences, key heads, room, width).");
  const int sequences = keys.shape(0), width = keys.shape(3);
  require(is_width(width, form_), "heads must be a multiple of 16, at most 256 and no narrower than the rotary positions.");
  require(place >= 0 && place < keys.shape(2), "the cache has no room for the token.");
  require(q.ndim() > 0 && q.shape(-1) == heads_ * width && q.size() == (size_t)sequences * q.shape(-1),
          "q must be of each sequence one row of all heads.");
  require(k.ndim() > 0 && k.shape(-1) == key_heads_ * width && k.size() == (size_t)sequences * k.shape(-1) &&
              v.shape() == k.shape(),
          "k and v must be of each sequence one row of all key heads.");
  require(padding.has_value() == mask.has_value() && (padding || sequences == 1),
          "padding and a mask must be given for several sequences.");
  Arrays in{q, k, v, keys, values};
  if (padding) {
    require(padding->dtype() == mx::int32 && padding->size() == (size_t)sequences,
            "padding must be int32, one of each sequence.");
    require(mask->dtype() == mx::bool_ && mask->size() == (size_t)sequences * (place + 1),
            "the mask must be bool, of each sequence up to the token.");
    in.insert(in.end(), {*padding, *mask});
  } else {
    in.push_back(table(place));
  }
  auto native = std::make_shared<TokenAttention>(cpu_stream(), *this, place);
  auto out = mx::array::make_arrays({q.shape(), keys.shape(), values.shape()}, {mx::float32, mx::float32, mx::float32},
                                    std::move(native), std::move(in));
  return {out[0], out[1], out[2]};
}

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& mask,
    int oldest) {
  for (const mx::array& a : {q, k, v})
    require(a.ndim() == 4 && a.size() > 0 && a.dtype() == mx::float32, "q, k, v must be 4-D and float32.");
  const int width = q.shape(3);
  require(width % 16 == 0 && width <= ATTEND_WIDTH && k.shape(3) == width && k.shape() == v.shape(),
          "heads must be equally wide, a multiple of 16 and at most 256.");
  require(k.shape(0) == q.shape(0) && q.shape(1) % k.shape(1) == 0, "the heads of q and k do not fit.");
  require(!causal || k.shape(2) >= q.shape(2), "a causal q can't be longer than k.");
  const int sequences = q.shape(0), keys = k.shape(2);
  require(oldest >= 0 && oldest < keys, "the oldest key is not there.");
  require(!mask || (mask->dtype() == mx::bool_ && q.shape(2) == 1 && !causal && mask->ndim() > 0 &&
                    mask->shape(-1) == keys && mask->size() % keys == 0 &&
                    (mask->size() == (size_t)keys || mask->size() == (size_t)sequences * keys)),
          "a mask must be bool, (keys,) or of each sequence, for one row of each.");
  auto stream = cpu_stream();
  auto fallback = [=](const Native::Arrays& in) -> Native::Arrays {
    auto given = in.size() > 3 ? std::optional(in[3]) : std::nullopt;
    return {mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale, causal ? "causal" : "", given, {}, false,
                                                   stream)};
  };
  auto native = std::make_shared<Attention>(stream, fallback, scale, causal && q.shape(2) > 1, oldest);
  Native::Arrays in{q, k, v};
  if (mask) in.push_back(*mask);
  return mx::array(q.shape(), q.dtype(), std::move(native), std::move(in));
}

}  // namespace spqt
