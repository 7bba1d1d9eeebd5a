// Random normalization, rotary positions, attention, gates and sums of exponentials.
#include <algorithm>

#include "fuzz.h"

namespace {

bool say(bool right, std::initializer_list<int> sizes) {
  for (int size : sizes)
    if (!right) std::printf(" %d", size);
  if (!right) std::printf("\n");
  return right;
}

// softmax(q . k * scale) . v
Sums attended(const Attend& a) {
  Sums want((size_t)a.rows * a.width);
  for (int r = 0; r < a.rows; ++r) {
    std::vector<double> p(a.visible + r * a.visible_step);
    double highest = -1e300, total = 0;
    for (size_t j = 0; j < p.size(); ++j) {
      for (int d = 0; d < a.width; ++d) p[j] += (double)a.scale * a.q[r * a.q_stride + d] * a.k[j * a.k_stride + d];
      highest = std::max(highest, p[j]);
    }
    for (double& one : p) total += one = std::exp(one - highest);
    for (size_t j = 0; j < p.size(); ++j)
      for (int d = 0; d < a.width; ++d) want.add(r * a.width + d, p[j] / total * a.v[j * a.v_stride + d]);
  }
  return want;
}

}  // namespace

bool normalized(Random& random) {
  const int rows = 1 + below(random, 3), width = 1 + below(random, 300);
  const Array x = random_values(random, FLOAT32, (size_t)rows * width, 2), weight = random_values(random, FLOAT32, width, 2);
  const bool weighted = below(random, 2);
  Array y(FLOAT32, x.n);
  kernels().rms_norm({x.floats(), weighted ? weight.floats() : nullptr, y.floats(), rows, width, 1e-5f});
  Sums want(x.n);
  for (int r = 0; r < rows; ++r) {
    double squares = 0;
    for (int i = 0; i < width; ++i) squares += x[r * width + i] * x[r * width + i];
    for (int i = 0; i < width; ++i)
      want.add(r * width + i, x[r * width + i] / std::sqrt(squares / width + 1e-5f) * (weighted ? weight[i] : 1));
  }
  return say(close("rms_norm", y, want, width, width), {rows, width});
}

bool turned(Random& random) {
  const int half = 1 + below(random, 70), width = 2 * half + below(random, 3) * below(random, 20);
  const int positions = 1 + below(random, 5), x_stride = width + below(random, 9), y_stride = width + below(random, 9);
  const bool traditional = below(random, 2);
  const Array x = random_values(random, FLOAT32, (size_t)(positions - 1) * x_stride + width, 2);
  const Array table = random_values(random, FLOAT32, (size_t)positions * 2 * half, 1);
  Array y(FLOAT32, (size_t)(positions - 1) * y_stride + width);
  kernels().rope({x.floats(), y.floats(), x_stride, y_stride, table.floats(), positions, half, width, traditional});
  Sums want((size_t)positions * width);
  for (int p = 0; p < positions; ++p)
    for (int i = 0; i < width; ++i) {
      const size_t from = (size_t)p * x_stride;
      if (i >= 2 * half) {
        want.add(p * width + i, x[from + i]);
        continue;
      }
      const int pair = traditional ? i / 2 : i % half, second = traditional ? i % 2 : i / half;
      const double a = x[from + (traditional ? 2 * pair : pair)], b = x[from + (traditional ? 2 * pair + 1 : pair + half)];
      const double cosine = table[p * 2 * half + pair], sine = table[p * 2 * half + half + pair];
      want.add(p * width + i, second ? a * sine + b * cosine : a * cosine - b * sine);
    }
  return say(close("rope", y, want, width, y_stride), {half, width, positions, traditional});
}

bool attention(Random& random) {
  const int width = 16 * (1 + below(random, ATTEND_WIDTH / 16)), many = below(random, 2);
  const int causal = many && below(random, 4), heads = 1 + below(random, 5);
  const int rows = many ? one_of(random, {1 + below(random, 30), 1 + below(random, ATTEND_ROWS), ATTEND_ROWS}) : heads;
  const int near = one_of(random, {0, ATTEND_KEYS, 2 * ATTEND_KEYS, 3 * ATTEND_KEYS}) + below(random, 5) - 2;
  const int keys = many ? std::max(rows, one_of(random, {near, rows + below(random, 200)}))
                        : one_of(random, {1 + below(random, SPLIT_KEYS), SPLIT_KEYS - below(random, 3)});
  const int64_t q_stride = width + below(random, 5), k_stride = width + below(random, 5), y_stride = width + below(random, 40);
  const Array q = random_values(random, FLOAT32, (rows - 1) * q_stride + width, 2);
  const Array k = random_values(random, FLOAT32, (keys - 1) * k_stride + width, 2);
  const Array v = random_values(random, FLOAT32, (keys - 1) * k_stride + width, 2);
  Array y(FLOAT32, (rows - 1) * y_stride + width), top(FLOAT32, rows), sum(FLOAT32, rows), work(FLOAT32, WORK);
  std::vector<int32_t> places(keys);  // of few rows' keys, which may lie in any order
  for (int j = 0; j < keys; ++j) std::swap(places[j] = j, places[below(random, j + 1)]);
  const bool placed = !many && below(random, 2);
  const Attend a{q.floats(), k.floats(), v.floats(), q_stride, k_stride, k_stride, rows, keys, width,
                 1 / std::sqrt((float)width), causal ? keys - rows + 1 : keys, causal, y.floats(), y_stride,
                 top.floats(), sum.floats(), placed ? places.data() : nullptr};
  (many ? kernels().attend_many : kernels().attend_few)(a, work.floats());
  for (int r = 0; r < rows && !many; ++r)
    for (int d = 0; d < width; ++d) a.y[r * y_stride + d] /= a.sum[r];
  const bool right = close(many ? "attend_many" : "attend_few", y, attended(a), width, y_stride) &&
      top.intact(rows, rows) && sum.intact(rows, rows) && work.intact(WORK, WORK);
  return say(right, {rows, keys, width, causal});
}

// silu(gate) * up, at any length, with values where e^-g ends at 0 and at infinity
bool gated(Random& random) {
  const int n = 1 + below(random, 70);
  Array gate = random_values(random, FLOAT32, n, 2);
  const Array up = random_values(random, FLOAT32, n, 2);
  Sums want(n);
  for (int i = 0; i < n; ++i) {
    gate.floats()[i] *= one_of(random, {1.0f, 1.0f, 20.0f, 60.0f});
    want.add(i, gate[i] / (1 + std::exp(-gate[i])) * up[i]);
  }
  kernels().gate(gate.floats(), up.floats(), n);
  return say(close("gate", gate, want, n, n), {n});
}

bool sum_of_exponentials(Random& random) {
  const int n = 1 + below(random, 200);
  Array x = random_values(random, FLOAT32, n, 2);
  const float offset = one_of(random, {0.0f, -300.0f, 1e4f});
  for (int i = 0; i < n; ++i) x.floats()[i] = x.floats()[i] * one_of(random, {1.0f, 30.0f}) + offset;
  const bool nan = below(random, 4) == 0;
  if (nan) x.floats()[below(random, n)] = std::nanf("");
  Array largest(FLOAT32, 1), sum(FLOAT32, 1);
  kernels().sum_exp(x.floats(), n, largest.floats(), sum.floats());
  if (nan) return say(std::isnan(largest[0]) && std::isnan(sum[0]), {n});
  const float top = *std::max_element(x.floats(), x.floats() + n);
  Sums want(1);
  for (int i = 0; i < n; ++i) want.add(0, std::exp(x[i] - top));
  return say(largest[0] == top && close("sum_exp", sum, want, 1, 1), {n});
}
