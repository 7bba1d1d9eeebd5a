#include <algorithm>
#include <cmath>

#include "check.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "native.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

struct AttentionJob {
  std::shared_ptr<float[]> memory;
  Attend first;  // of the first head
  int64_t q_batch, q_head, k_batch, k_head, v_batch, v_head;
  int heads, key_heads, rows, splits, row_tasks;
  bool causal;
  float* y;
  int tasks;
};

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
  const int first = split * SPLIT_KEYS;
  Attend a = head_of(job, group / job.key_heads, group % job.key_heads * shared);
  a.q_stride = job.q_head;
  a.rows = shared;
  a.k += first * a.k_stride;
  a.v += first * a.v_stride;
  a.visible = a.keys = std::min(SPLIT_KEYS, a.keys - first);
  float* part = job.memory.get() + (int64_t)task * shared * (a.width + 2);
  a.top = part;
  a.sum = part + shared;
  a.y = part + 2 * shared;
  a.y_stride = a.width;
  kernels().attend_few(a, thread_work());
}

// The stretches of one row together, in the order of the keys.
void join_splits(const AttentionJob& job, int row) {
  const int shared = job.heads / job.key_heads, width = job.first.width, lane = row % shared;
  const float* parts = job.memory.get() + (int64_t)(row / shared) * job.splits * shared * (width + 2);
  const int64_t size = (int64_t)shared * (width + 2);
  float top = parts[lane], sum = 0;
  for (int s = 1; s < job.splits; ++s) top = std::max(top, parts[s * size + lane]);
  float* y = job.y + (int64_t)row * width;
  std::fill(y, y + width, 0.0f);
  for (int s = 0; s < job.splits; ++s) {
    const float* part = parts + s * size;
    const float factor = std::exp(part[lane] - top);
    sum += factor * part[shared + lane];
    for (int d = 0; d < width; ++d) y[d] += factor * part[2 * shared + lane * width + d];
  }
  for (int d = 0; d < width; ++d) y[d] /= sum;
}

class Attention : public Native {
 public:
  Attention(mx::Stream stream, Fallback fallback, float scale, bool causal)
      : Native(stream, std::move(fallback)), scale_(scale), causal_(causal) {}

  void eval_cpu(const Arrays& in, Arrays& out) override {
    out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch([job = plan(in, out[0])]() {
      auto* context = const_cast<AttentionJob*>(&job);
      if (job.rows > 1) return parallel(job.tasks, run_rows, context);
      parallel(job.tasks, run_split, context);
      for (int row = 0; row < job.tasks / job.splits * (job.heads / job.key_heads); ++row) join_splits(job, row);
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
};

}  // namespace

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal) {
  for (const mx::array& a : {q, k, v})
    require(a.ndim() == 4 && a.size() > 0 && a.dtype() == mx::float32, "q, k, v must be 4-D and float32.");
  const int width = q.shape(3);
  require(width % 16 == 0 && width <= ATTEND_WIDTH && k.shape(3) == width && k.shape() == v.shape(),
          "heads must be equally wide, a multiple of 16 and at most 256.");
  require(k.shape(0) == q.shape(0) && q.shape(1) % k.shape(1) == 0, "the heads of q and k do not fit.");
  require(!causal || k.shape(2) >= q.shape(2), "a causal q can't be longer than k.");
  auto stream = cpu_stream();
  auto fallback = [=](const Native::Arrays& in) -> Native::Arrays {
    return {mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale, causal ? "causal" : "", {}, {}, false,
                                                   stream)};
  };
  auto native = std::make_shared<Attention>(stream, fallback, scale, causal && q.shape(2) > 1);
  return mx::array(q.shape(), q.dtype(), std::move(native),
                   {q, k, v});
}

}  // namespace spqt
