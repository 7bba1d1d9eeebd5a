// Random products with packed matrices: sparse, of many rows, and of one row in MLX's own layout.
#include <algorithm>
#include <memory>

#include "fuzz.h"
#include "pool.h"

namespace {

struct Stripes {
  Tile tile;
  Active active;
  int stripes;
  float* partials;
};

void run_stripe(void* context, int s) {
  const Stripes& job = *static_cast<Stripes*>(context);
  const int first = job.active.count * s / job.stripes, last = job.active.count * (s + 1) / job.stripes;
  float* partial = job.partials + s * partial_size(job.tile.groups, job.tile.group_size);
  Active part = job.active;
  part.channel += first, part.x += (size_t)first * part.rows, part.count = last - first;
  spoil_stack();
  kernels().gemv(job.tile, part, partial);
}

bool say(bool right, const Packed& w) {
  if (!right) std::printf(" rows %d width %d bits %d group %d\n", w.rows, w.width, w.bits, w.group_size);
  return right;
}

// a layer's bias, as often as not
std::unique_ptr<Array> some_bias(Random& random, int n, Sums& want, int rows) {
  if (below(random, 2)) return nullptr;
  auto made = std::make_unique<Array>(random_values(random, any_type(random), n, 1));
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < n; ++i) want.add((size_t)r * n + i, (*made)[i]);
  return made;
}

Output output(Array& y, int outputs, const std::unique_ptr<Array>& bias) {
  return {y.data(), y.type, outputs, bias ? bias->data() : nullptr, bias ? bias->type : FLOAT32};
}

}  // namespace

bool sparse_gemv(Random& random) {
  const bool wide = below(random, 12) == 0;
  const Packed w(random, 1 + below(random, wide ? 12 : 70), 1 + below(random, wide ? TILE / 32 : 20));
  const int step = one_of(random, {1, 1, 3}), inputs = w.rows;
  const Array x = random_values(random, any_type(random), inputs, 2, step);
  const bool each = below(random, 2);
  std::vector<float> thresholds(each ? inputs : 1);
  for (float& t : thresholds) t = one_of(random, {0.0f, 0.5f, 1.5f, 9.0f});
  std::vector<int32_t> channel(inputs);
  Array kept(FLOAT32, inputs);
  const Input input{x.data(), x.type, step, inputs, below(random, 8) ? thresholds.data() : nullptr, each};
  const int count = kernels().collect(input, channel.data(), kept.floats());
  const int stripes = 1 + below(random, 4), outputs = w.width - below(random, w.group_size);
  Array partials(FLOAT32, stripes * partial_size(w.width / w.group_size, w.group_size)), y(any_type(random), outputs);
  Stripes job{w.tile(), {channel.data(), kept.floats(), count}, stripes, partials.floats()};
  parallel(stripes, run_stripe, &job);
  Sums want(outputs);
  const auto bias = some_bias(random, outputs, want, 1);
  spoil_stack();
  kernels().finish(job.tile, partials.floats(), stripes, output(y, outputs, bias));
  for (int k = 0; k < inputs; ++k)
    if (!input.threshold || !((float)std::fabs(x[k * step]) < thresholds[each ? k : 0]))
      for (int j = 0; j < outputs; ++j) want.add(j, x[k * step] * w.value(k, j));
  const bool right = close("gemv", y, want, outputs, outputs) && kept.intact(inputs, inputs) &&
      partials.intact(partials.n, partials.n);
  return say(right, w);
}

// 2, 4 or 8 rows, each of which needs some of the channels: also the same bits as each alone
bool collected(Random& random) {
  const int padded = one_of(random, {2, 4, 8}), rows = 1 + below(random, padded), inputs = 1 + below(random, 100);
  const size_t stride = inputs + below(random, 5);
  const Array x = random_values(random, any_type(random), (rows - 1) * stride + inputs, 2);
  const bool each = below(random, 2), none = below(random, 4) == 0;
  const Array threshold = random_values(random, FLOAT32, each ? inputs : 1, 2);
  Array found(FLOAT32, (size_t)inputs * padded);
  std::vector<int32_t> channel(inputs);
  std::vector<uint32_t> counts(rows);
  const Input in{x.data(), x.type, 1, inputs, none ? nullptr : threshold.floats(), each};
  const int count = kernels().collect_rows(in, stride * x.size(), rows, padded, channel.data(), found.floats(), counts.data());
  int at = 0;
  bool right = true;
  for (int k = 0; k < inputs; ++k) {
    bool needed = false;
    std::vector<double> kept(padded);
    for (int r = 0; r < rows; ++r) {
      const double value = x[r * stride + k];
      if (!none && std::fabs(value) < threshold[each ? k : 0]) continue;
      needed = true;
      kept[r] = value;
      --counts[r];
    }
    if (!needed) continue;
    right = right && at < count && channel[at] == k;
    for (int r = 0; r < padded && right; ++r) right = found[at * padded + r] == kept[r];
    ++at;
  }
  for (uint32_t left : counts) right = right && left == 0;
  if (right && at == count && found.intact(found.n, found.n)) return true;
  return std::printf("%s collect_rows: %d rows of %d, %d inputs\n", kernels().name, rows, padded, inputs), false;
}

bool few_rows(Random& random) {
  const int rows = one_of(random, {2, 4, 8}), widest = tile_of_rows(rows) / 128;
  const Packed w(random, 1 + below(random, 150), 1 + below(random, below(random, 12) ? 12 : widest));
  const int inputs = w.rows, outputs = w.width - below(random, w.group_size);
  Array x = random_values(random, FLOAT32, (size_t)inputs * rows, 2);
  for (int k = 0; k < inputs; ++k)
    for (int r = 0; r < rows; ++r)
      if (below(random, 3) == 0) x.floats()[k * rows + r] = 0;
  std::vector<int32_t> channel(inputs);
  for (int k = 0; k < inputs; ++k) channel[k] = k;
  const size_t size = partial_size(w.width / w.group_size, w.group_size);
  Array partials(FLOAT32, rows * size), y(FLOAT32, (size_t)rows * outputs), one(FLOAT32, size), alone(FLOAT32, outputs);
  spoil_stack();
  kernels().gemv(w.tile(), {channel.data(), x.floats(), inputs, rows, size}, partials.floats());
  Sums want((size_t)rows * outputs);
  bool same = true;
  for (int r = 0; r < rows; ++r) {
    spoil_stack();
    kernels().finish(w.tile(), partials.floats() + r * size, 1, {y.floats() + r * outputs, FLOAT32, outputs, nullptr, FLOAT32});
    std::vector<int32_t> own;
    std::vector<float> of_own;
    for (int k = 0; k < inputs; ++k) {
      const float value = x[k * rows + r];
      if (value != 0) own.push_back(k), of_own.push_back(value);
      for (int j = 0; j < outputs; ++j) want.add((size_t)r * outputs + j, value * w.value(k, j));
    }
    spoil_stack();
    kernels().gemv(w.tile(), {own.data(), of_own.data(), (int)own.size()}, one.floats());
    kernels().finish(w.tile(), one.floats(), 1, {alone.floats(), FLOAT32, outputs, nullptr, FLOAT32});
    for (int j = 0; j < outputs; ++j) same &= alone.floats()[j] == y.floats()[r * outputs + j];
  }
  if (!same) std::printf("few rows: a row beside %d others is not what it is alone;", rows - 1);
  const bool right = close("few rows", y, want, outputs, outputs) && partials.intact(partials.n, partials.n);
  return say(right && same, w);
}

bool many_rows(Random& random) {
  const bool along_inputs = below(random, 2);
  const Packed w(random, 1 + below(random, along_inputs ? 70 : 600), 1 + below(random, along_inputs ? 20 : 6));
  const int rows = below(random, 16) ? 1 + below(random, 30) : GEMM_ROWS - below(random, 13);
  const int inputs = along_inputs ? w.width : w.rows, x_stride = inputs + below(random, 3);
  const int all = along_inputs ? w.rows : w.width, first = below(random, (all + 31) / 32) * 32;
  const int outputs = std::min(all - first, GEMM_OUTPUTS - below(random, 2) * below(random, 40));
  const int y_stride = outputs + below(random, 40);
  const Array x = random_values(random, FLOAT32, (size_t)(rows - 1) * x_stride + inputs, 2);
  Array y(any_type(random), (size_t)(rows - 1) * y_stride + outputs), work(FLOAT32, WORK);
  Sums want((size_t)rows * outputs);
  const auto bias = some_bias(random, outputs, want, rows);
  spoil_stack();
  kernels().gemm({x.floats(), x_stride, rows, inputs, w.tile(), first, along_inputs, output(y, outputs, bias), y_stride},
                 work.floats());
  for (int k = 0; k < inputs; ++k)
    for (int j = 0; j < outputs; ++j) {
      const double one = along_inputs ? w.value(first + j, k) : w.value(k, first + j);
      for (int r = 0; r < rows; ++r) want.add((size_t)r * outputs + j, x[(size_t)r * x_stride + k] * one);
    }
  const bool right = close(along_inputs ? "gemm of rows" : "gemm", y, want, outputs, y_stride);
  return say(right && work.intact(WORK, WORK), w);
}

// Two or four tokens beside each other, each with the bits that it has alone.
bool few_tokens(Random& random) {
  const Packed w(random, 1 + below(random, 40), 1 + below(random, 30));
  const int tokens = one_of(random, {2, 4}), groups = w.width / w.group_size;
  const size_t own = prepared_size(w.width), stride = own + groups + below(random, 3);
  const Array x = random_values(random, any_type(random), (size_t)tokens * w.width, 2);
  Array prepared(FLOAT32, tokens * stride), scales(FLOAT32, groups + PADDING);
  for (int t = 0; t < tokens; ++t)
    kernels().prepare({(const uint8_t*)x.data() + t * w.width * x.size(), x.type, 1, w.width, nullptr, 0}, w.bits,
                      w.group_size, prepared.floats() + t * stride, prepared.floats() + t * stride + own);
  const int64_t y_stride = w.rows + below(random, 3);
  const Type type = any_type(random);
  Array y(type, (tokens - 1) * y_stride + w.rows), alone(type, y.n);
  Sums all(w.rows);
  const auto bias = some_bias(random, w.rows, all, 1);
  Rows rows{w.tile(), w.width, 0, w.rows, prepared.floats(), prepared.floats() + own, output(y, w.rows, bias), tokens,
            stride, y_stride};
  spoil_stack();
  kernels().rows(rows, scales.floats());
  rows.tokens = 1;
  for (int t = 0; t < tokens; ++t) {
    rows.out.y = (uint8_t*)alone.data() + t * y_stride * alone.size();
    kernels().rows(rows, scales.floats());
    rows.prepared += stride;
    rows.group_sums += stride;
  }
  if (y.bytes == alone.bytes && y.intact(w.rows, y_stride) && scales.intact(scales.n, scales.n)) return true;
  return std::printf("rows: a token's bits depend on others;"), say(false, w);
}

bool one_row(Random& random) {
  const Packed w(random, 1 + below(random, 40), 1 + below(random, 30));
  const int step = one_of(random, {1, 1, 3}), groups = w.width / w.group_size;
  const Array x = random_values(random, any_type(random), w.width, 2, step);
  Array prepared(FLOAT32, prepared_size(w.width)), sums(FLOAT32, groups), scales(FLOAT32, groups + PADDING);
  kernels().prepare({x.data(), x.type, step, w.width, nullptr, 0}, w.bits, w.group_size, prepared.floats(), sums.floats());
  const int first = below(random, w.rows), count = 1 + below(random, w.rows - first);
  Array y(any_type(random), w.rows);
  Sums all(w.rows), want(count);
  const auto bias = some_bias(random, w.rows, all, 1);
  spoil_stack();
  kernels().rows({w.tile(), w.width, first, count, prepared.floats(), sums.floats(), output(y, w.rows, bias)},
                 scales.floats());
  Array found(y.type, count);  // the rows asked for; the others are as they were
  for (int m = 0; m < w.rows; ++m) {
    if (m < first || m >= first + count) {
      if (!y.is_unwritten(m)) return std::printf("rows: row %d was not asked for;", m), say(false, w);
      continue;
    }
    std::memcpy(&found.bytes[(m - first) * y.size()], &y.bytes[m * y.size()], y.size());
    want.add(m - first, all.want[m]);
    for (int k = 0; k < w.width; ++k) want.add(m - first, x[k * step] * w.value(m, k));
  }
  const bool right = close("rows", found, want, count, count) && y.intact(y.n, y.n) && sums.intact(groups, groups) &&
      prepared.intact(prepared.n, prepared.n) && scales.intact(scales.n, scales.n);
  return say(right, w);
}
