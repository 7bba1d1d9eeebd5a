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
constexpr size_t STRIPE_BYTES = 32 * 1024;  // of weights; below it a task's own cost shows
constexpr size_t APART_BYTES = 4 << 20;     // of a task's weights that rows may read one after another: the first
                                            // brings them into a cache

using Shape = ProjectionShape;

// Rows that pass through the kernel together: `rows` of them, padded with zeros to what the kernel takes.
struct List {
  Input input;  // of the first row
  int64_t row_stride;
  int rows, padded;
  int32_t* channel;
  float* x;
  uint32_t* active;  // of the first row, or nullptr
  const uint32_t* before;
  uint32_t* read;  // of all lists of the projection, or nullptr
  int weighed;  // how often a list of one row counts there
  int count;
  double together;  // what a channel of several rows costs, in channels of one row
  bool apart;       // each row by itself, by lists of their own: they need few of one another's channels
  int32_t* own_channel;  // (rows, room)
  float* own_x;
  int own_count[FEW_ROWS];
};

// Active channels of a stripe: which they are, and x there.
struct Part {
  const int32_t* channel;
  const float* x;
  int count;
};

// Of experts: bytes from one's arrays to the next's, and which one a tile is of.
struct Stack {
  size_t codes, scales, bias;
  uint32_t experts;
  int pair;
};

struct TileOf {
  Tile tile;  // of the first expert until the chosen ones are known
  Output out;
  Stack stack;
  bool exists;  // the expert that was chosen
  int64_t y_stride;  // bytes from row to row
  int list;
  float* partials;  // of each row `stripes` results
  int stripes;
};

struct Task {
  int tile, stripe;
};

}  // namespace

struct Job {
  Scratch memory;
  std::vector<List> lists;      // by projection, then by rows
  std::vector<TileOf> tiles;
  std::vector<std::atomic<int>> missing;  // by tile, stripes not yet summed: the last one finishes the tile
  std::vector<Task> tasks;
  std::vector<std::pair<uint32_t*, const uint32_t*>> read;  // counts of read channels, and what they go on from
  const uint32_t* chosen = nullptr;  // the expert of each pair
};

namespace {

size_t padded_room(int inputs) { return ((size_t)inputs + PADDING - 1) / PADDING * PADDING; }  // sums on cache lines

// A stripe's part of a list of channels with `rows` numbers each. Stripes are cut by channels, so that a row's sums are
// the same whatever other rows need.
Part part_of(const int32_t* channel, const float* x, int count, int rows, int inputs, const TileOf& t, int stripe) {
  auto position = [&](int border) {
    return std::lower_bound(channel, channel + count, (int64_t)inputs * border / t.stripes) - channel;
  };
  const auto first = position(stripe), last = position(stripe + 1);
  return {channel + first, x + first * rows, (int)(last - first)};
}

size_t task_bytes(const TileOf& t, int inputs) {
  return (size_t)t.tile.groups * t.tile.group_size * t.tile.bits / 8 * inputs / t.stripes;
}

void run_task(void* context, int index) {
  Job& job = *static_cast<Job*>(context);
  Task task = job.tasks[index];
  TileOf& t = job.tiles[task.tile];
  if (!t.exists) {
    if (task.stripe == 0) fill_with_nan(t.out);
    return;
  }
  const List& list = job.lists[t.list];
  const int inputs = list.input.inputs;
  const size_t size = partial_size(t.tile.groups, t.tile.group_size);
  float* partial = t.partials + task.stripe * size;
  if (list.apart && task_bytes(t, inputs) <= APART_BYTES) {
    for (int r = 0; r < list.rows; ++r, partial += t.stripes * size) {
      const size_t own = r * padded_room(inputs);
      const Part p = part_of(list.own_channel + own, list.own_x + own, list.own_count[r], 1, inputs, t, task.stripe);
      kernels().gemv(t.tile, {p.channel, p.x, p.count}, partial);
    }
  } else {
    const Part p = part_of(list.channel, list.x, list.count, list.padded, inputs, t, task.stripe);
    kernels().gemv(t.tile, {p.channel, p.x, p.count, list.padded, t.stripes * size}, partial);
  }
  if (job.missing[task.tile].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  Output out = t.out;
  for (int r = 0; r < list.rows; ++r) {
    kernels().finish(t.tile, t.partials + r * t.stripes * size, t.stripes, out);
    out.y = static_cast<uint8_t*>(out.y) + t.y_stride;
  }
}

// The channels that any row needs, and what each row has there.
void collect(List& list) {
  if (list.padded == 1) {
    list.count = kernels().collect(list.input, list.channel, list.x);
    if (list.active) *list.active = (list.before ? *list.before : 0) + list.count;
    if (list.read) *list.read += (uint32_t)list.count * list.weighed;
    return;
  }
  uint32_t counts[FEW_ROWS];
  list.count = kernels().collect_rows(list.input, list.row_stride, list.rows, list.padded, list.channel, list.x, counts);
  for (int r = 0; r < list.rows && list.active; ++r)
    list.active[r] = (list.before ? list.before[r] : 0) + counts[r];
  if (list.read) *list.read += list.count;
  uint64_t needed = 0;
  for (int r = 0; r < list.rows; ++r) needed += counts[r];
  list.apart = needed < list.together * list.count;
  for (int r = 0; r < list.rows && list.apart; ++r) {
    Input in = list.input;
    in.x = static_cast<const uint8_t*>(in.x) + r * list.row_stride;
    const size_t own = r * padded_room(in.inputs);
    list.own_count[r] = kernels().collect(in, list.own_channel + own, list.own_x + own);
  }
}

// Let a tile's pointers be those of the expert that was chosen.
void choose(TileOf& t, const uint32_t* chosen) {
  const size_t expert = chosen[t.stack.pair];
  t.exists = expert < t.stack.experts;
  if (!t.exists) return;
  t.tile.codes += expert * t.stack.codes;
  t.tile.scales = static_cast<const uint8_t*>(t.tile.scales) + expert * t.stack.scales;
  t.tile.biases = static_cast<const uint8_t*>(t.tile.biases) + expert * t.stack.scales;
  if (t.out.bias) t.out.bias = static_cast<const uint8_t*>(t.out.bias) + expert * t.stack.bias;
}

}  // namespace

void run_job(Job& job) {
  job.memory.start();
  if (job.chosen)
    for (TileOf& t : job.tiles) choose(t, job.chosen);
  for (auto [read, before] : job.read) *read = before ? *before : 0;
  for (List& list : job.lists) collect(list);
  for (size_t i = 0; i < job.tiles.size(); ++i) job.missing[i] = job.tiles[i].stripes;
  parallel(job.tasks.size(), run_task, &job);
}

namespace {

// The tiles of one projection: whole groups of one band, at most `widest` outputs, near-equal in width.
struct Cut {
  int band, first_group, groups, outputs;
};

std::vector<Cut> cut(int outputs, int band, int group_size, int widest) {
  constexpr int EVEN = 256;  // outputs: parts begin on a cache line and on a whole column
  std::vector<Cut> cuts;
  for (int b = 0; b * band < outputs; ++b) {
    int here = std::min(band, outputs - b * band);
    int parts = (here + widest - 1) / widest;
    int width = parts == 1 ? here : ((here + parts - 1) / parts + EVEN - 1) / EVEN * EVEN;
    for (int first = 0; first < here; first += width) {
      int some = std::min(width, here - first);
      cuts.push_back({b, first / group_size, (some + group_size - 1) / group_size, some});
    }
  }
  return cuts;
}

// Of a tile, by the matrix alone and not by the rows: as one row wants them.
int stripes_of(const Shape& s, const mx::array& weight, int band) {
  const int width = weight.shape(-1) * 32 / s.bits, here = std::min(width, s.outputs - band * width);
  const int parts = (here + TILE - 1) / TILE;
  return std::clamp<size_t>((size_t)here / parts * s.bits / 8 * weight.shape(-2) / STRIPE_BYTES, 1, MAX_STRIPES);
}

int padded_to(int rows) { return rows > 4 ? FEW_ROWS : rows > 2 ? 4 : rows; }

List list_of(const Shape& s, const Row& x, int first, int padded, const Arrays& in, size_t at) {
  const mx::array* threshold = s.has_threshold ? &in[at + 3] : nullptr;
  const int inputs = in[at].shape(-2);
  const int64_t row_stride = (int64_t)inputs * (x.type == FLOAT32 ? 4 : 2);
  List list{};
  list.input = {static_cast<const uint8_t*>(x.data) + first * row_stride, x.type, x.stride, inputs,
                threshold ? threshold->data<float>() : nullptr, threshold && threshold->size() > 1};
  list.row_stride = row_stride;
  list.rows = std::min(padded, x.rows - first);
  list.padded = padded;
  list.together = padded > 1 ? kernels().together(padded, s.bits) : 0;
  return list;
}

TileOf tile_of(const Shape& s, const Cut& c, const Arrays& in, size_t at, const Place& y, int y_row) {
  const mx::array &weight = in[at], &scales = in[at + 1], &biases = in[at + 2];
  const mx::array* bias = s.has_bias ? &in[at + 3 + s.has_threshold] : nullptr;
  const size_t code_stride = weight.shape(-1) * 4, scale_stride = scales.shape(-1);
  const size_t row = (size_t)c.band * weight.shape(-2);
  const size_t codes = row * code_stride + (size_t)c.first_group * s.group_size * s.bits / 8;
  const size_t group = (row * scale_stride + c.first_group) * scales.itemsize();
  const int first = (c.band * (int)scale_stride + c.first_group) * s.group_size;
  const int width = y.type == FLOAT32 ? 4 : 2;
  TileOf t;
  t.tile = {weight.data<uint8_t>() + codes, code_stride, scales.data<uint8_t>() + group,
            biases.data<uint8_t>() + group, scale_stride, type_of(scales), c.groups, s.group_size, s.bits};
  t.y_stride = (int64_t)s.outputs * width;
  t.out = {static_cast<uint8_t*>(y.data) + y_row * t.y_stride + (int64_t)first * width, y.type, c.outputs,
           bias ? bias->data<uint8_t>() + first * bias->itemsize() : nullptr, bias ? type_of(*bias) : FLOAT32};
  t.stripes = stripes_of(s, weight, c.band);
  t.exists = true;
  const size_t channels = (size_t)weight.shape(-3) * weight.shape(-2);  // of all bands of an expert
  t.stack = {channels * code_stride, channels * scale_stride * scales.itemsize(),
             bias ? s.outputs * bias->itemsize() : 0, (uint32_t)weight.shape(0), y_row};
  return t;
}

}  // namespace

void fill_with_nan(const Output& out) {
  static const uint32_t wide = 0x7fc00000;
  static const uint16_t half = 0x7e00, brain = 0x7fc0;
  if (out.type == FLOAT32) return std::fill_n(static_cast<uint32_t*>(out.y), out.outputs, wide), void();
  std::fill_n(static_cast<uint16_t*>(out.y), out.outputs, out.type == FLOAT16 ? half : brain);
}

size_t after(const Shape& s, size_t at) { return at + 3 + s.has_threshold + s.has_bias; }

Row row_of(const mx::array& x) { return {x.data<void>(), type_of(x), x.strides(-1)}; }

Row rows_of(const mx::array& x) { return {x.data<void>(), type_of(x), 1, (int)(x.size() / x.shape(-1))}; }

std::shared_ptr<Job> plan(const std::vector<Shape>& shapes, const Row& x, const Operands& operands,
                          const std::vector<Place>& y, const Counts& counts, mx::Stream stream,
                          const Chosen* chosen) {
  const Arrays& in = operands.arrays;
  const int padded = chosen ? 1 : padded_to(x.rows), parts = (x.rows + padded - 1) / padded;
  const int each = chosen ? chosen->pairs / x.rows : 1;  // rows of y that a list serves
  const size_t room = padded_room(in[operands.at].shape(-2));
  const size_t list_room = (1 + padded + (padded > 1 ? 2 * padded : 0)) * room;
  auto job = std::make_shared<Job>();
  if (chosen) job->chosen = chosen->experts;
  size_t used = 0;  // floats: lists first, then partial sums
  for (size_t p = 0, at = operands.at; p < shapes.size(); at = after(shapes[p++], at)) {
    const Shape& s = shapes[p];
    for (int part = 0; part < parts; ++part, used += list_room) {
      List list = list_of(s, x, part * padded, padded, in, at);
      if (chosen) {
        list.read = counts.active ? counts.active + p : nullptr;
        list.weighed = each;
        job->lists.push_back(list);
        continue;
      }
      const size_t first = p * counts_of(x.rows), place = first + part * padded;
      if (counts.active) list.active = counts.active + place;
      if (counts.before) list.before = counts.before + place;
      if (counts.active && padded > 1) list.read = counts.active + first + x.rows;
      job->lists.push_back(list);
    }
    if (uint32_t* read = job->lists.back().read) {
      const size_t place = read - counts.active;
      job->read.push_back({read, counts.before ? counts.before + place : nullptr});
    }
    for (const Cut& c : cut(s.outputs, in[at + 1].shape(-1) * s.group_size, s.group_size, tile_of_rows(padded))) {
      const int first = job->tiles.size();
      for (int row = 0; row < parts * each; ++row) {
        job->tiles.push_back(tile_of(s, c, in, at, y[p], row * padded));
        job->tiles.back().list = p * parts + row / each;
      }
      for (int stripe = 0; stripe < job->tiles.back().stripes; ++stripe)
        for (int row = 0; row < parts * each; ++row) job->tasks.push_back({first + row, stripe});
    }
  }
  for (const TileOf& t : job->tiles) used += t.stripes * padded * partial_size(t.tile.groups, t.tile.group_size);
  job->memory = scratch(stream.index, PARTIALS, used);
  float* free = job->memory.get();
  for (List& list : job->lists) {
    list.channel = reinterpret_cast<int32_t*>(free);
    list.x = free + room;
    if (padded > 1) {
      list.own_channel = list.channel + (1 + padded) * room;
      list.own_x = free + (1 + 2 * padded) * room;
    }
    free += list_room;
  }
  for (TileOf& t : job->tiles) {
    t.partials = free;
    free += t.stripes * padded * partial_size(t.tile.groups, t.tile.group_size);
  }
  job->missing = std::vector<std::atomic<int>>(job->tiles.size());
  return job;
}

}  // namespace spqt
