#include "job.h"

#include <algorithm>
#include <atomic>

#include "check.h"
#include "pool.h"
#include "scratch.h"

namespace spqt {
namespace mx = mlx::core;
namespace {

constexpr int MAX_STRIPES = 8;
constexpr size_t STRIPE_BYTES = 32 * 1024;  // of active weights; below it a task's own cost shows

using Shape = ProjectionShape;

struct TileOf {
  Tile tile;
  Output out;
  int projection;
  float* partials;
  int stripes;
};

struct List {
  Input input;
  int32_t* channel;
  float* x;
  int count;
};

struct Task {
  int tile, stripe;
};

}  // namespace

struct Job {
  Scratch memory;
  std::vector<List> lists;      // per projection
  std::vector<TileOf> tiles;
  std::vector<std::atomic<int>> missing;  // by tile, stripes not yet summed: the last one finishes the tile
  std::vector<Task> tasks;      // room for all stripes is reserved when the job is made
  Counts counts;
};

namespace {

void run_task(void* context, int index) {
  Job& job = *static_cast<Job*>(context);
  Task task = job.tasks[index];
  TileOf& t = job.tiles[task.tile];
  const List& list = job.lists[t.projection];
  int first = (int64_t)list.count * task.stripe / t.stripes;
  int last = (int64_t)list.count * (task.stripe + 1) / t.stripes;
  size_t size = partial_size(t.tile.groups, t.tile.group_size);
  kernels().gemv(t.tile, {list.channel + first, list.x + first, last - first}, t.partials + task.stripe * size);
  if (job.missing[task.tile].fetch_sub(1, std::memory_order_acq_rel) == 1)
    kernels().finish(t.tile, t.partials, t.stripes, t.out);
}

}  // namespace

void run_job(Job& job) {
  job.memory.start();
  for (size_t p = 0; p < job.lists.size(); ++p) {
    List& list = job.lists[p];
    list.count = kernels().collect(list.input, list.channel, list.x);
    job.counts.active[p] = (job.counts.before ? job.counts.before[p] : 0) + list.count;
  }
  for (size_t i = 0; i < job.tiles.size(); ++i) {
    TileOf& t = job.tiles[i];
    size_t chunk = (size_t)t.tile.groups * t.tile.group_size * t.tile.bits / 8;
    t.stripes = std::clamp<size_t>(chunk * job.lists[t.projection].count / STRIPE_BYTES, 1, MAX_STRIPES);
    job.missing[i] = t.stripes;
    for (int s = 0; s < t.stripes; ++s) job.tasks.push_back({(int)i, s});
  }
  parallel(job.tasks.size(), run_task, &job);
}

namespace {

// The tiles of one projection: whole groups of one band, at most TILE outputs, near-equal in width.
struct Cut {
  int band, first_group, groups, outputs;
};

std::vector<Cut> cut(int outputs, int band, int group_size) {
  constexpr int EVEN = 256;  // outputs: parts begin on a cache line and on a whole column
  std::vector<Cut> cuts;
  for (int b = 0; b * band < outputs; ++b) {
    int here = std::min(band, outputs - b * band);
    int parts = (here + TILE - 1) / TILE;
    int width = parts == 1 ? here : ((here + parts - 1) / parts + EVEN - 1) / EVEN * EVEN;
    for (int first = 0; first < here; first += width) {
      int some = std::min(width, here - first);
      cuts.push_back({b, first / group_size, (some + group_size - 1) / group_size, some});
    }
  }
  return cuts;
}

List list_of(const Shape& s, const Row& x, const Arrays& in, size_t at) {
  const mx::array* threshold = s.has_threshold ? &in[at + 3] : nullptr;
  Input input{x.data, x.type, x.stride, in[at].shape(1), threshold ? threshold->data<float>() : nullptr,
              threshold && threshold->size() > 1};
  return {input, nullptr, nullptr, 0};
}

TileOf tile_of(const Shape& s, const Cut& c, const Arrays& in, size_t at, const Place& y) {
  const mx::array &weight = in[at], &scales = in[at + 1], &biases = in[at + 2];
  const mx::array* bias = s.has_bias ? &in[at + 3 + s.has_threshold] : nullptr;
  const size_t code_stride = weight.shape(2) * 4, scale_stride = scales.shape(2);
  const size_t row = (size_t)c.band * weight.shape(1);
  const size_t codes = row * code_stride + (size_t)c.first_group * s.group_size * s.bits / 8;
  const size_t group = (row * scale_stride + c.first_group) * scales.itemsize();
  const int first = (c.band * (int)scale_stride + c.first_group) * s.group_size;
  TileOf t;
  t.tile = {weight.data<uint8_t>() + codes, code_stride, scales.data<uint8_t>() + group,
            biases.data<uint8_t>() + group, scale_stride, type_of(scales), c.groups, s.group_size, s.bits};
  t.out = {static_cast<uint8_t*>(y.data) + first * (y.type == FLOAT32 ? 4 : 2), y.type, c.outputs,
           bias ? bias->data<uint8_t>() + first * bias->itemsize() : nullptr, bias ? type_of(*bias) : FLOAT32};
  return t;
}

}  // namespace

size_t after(const Shape& s, size_t at) { return at + 3 + s.has_threshold + s.has_bias; }

Row row_of(const mx::array& x) { return {x.data<void>(), type_of(x), x.strides(-1)}; }

std::shared_ptr<Job> plan(const std::vector<Shape>& shapes, const Row& x, const Operands& operands,
                          const std::vector<Place>& y, const Counts& counts, mx::Stream stream) {
  const Arrays& in = operands.arrays;
  const size_t room = ((size_t)in[operands.at].shape(1) + PADDING - 1) / PADDING * PADDING;  // sums on cache lines
  auto job = std::make_shared<Job>();
  job->counts = counts;
  size_t used = 0;  // floats: lists first, then partial sums
  for (size_t p = 0, at = operands.at; p < shapes.size(); at = after(shapes[p++], at)) {
    const Shape& s = shapes[p];
    job->lists.push_back(list_of(s, x, in, at));
    used += 2 * room;
    for (const Cut& c : cut(s.outputs, in[at + 1].shape(2) * s.group_size, s.group_size)) {
      job->tiles.push_back(tile_of(s, c, in, at, y[p]));
      job->tiles.back().projection = p;
      used += MAX_STRIPES * partial_size(c.groups, s.group_size);
    }
  }
  job->memory = scratch(stream.index, PARTIALS, used);
  float* free = job->memory.get();
  for (List& list : job->lists) {
    list.channel = reinterpret_cast<int32_t*>(free);
    list.x = free + room;
    free += 2 * room;
  }
  for (TileOf& t : job->tiles) {
    t.partials = free;
    free += MAX_STRIPES * partial_size(t.tile.groups, t.tile.group_size);
  }
  job->tasks.reserve(job->tiles.size() * MAX_STRIPES);
  job->missing = std::vector<std::atomic<int>>(job->tiles.size());
  return job;
}

}  // namespace spqt
