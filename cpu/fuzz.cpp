// Random shapes through every kernel and the thread pool, against sums in double. Not part of the extension:
// sanitize.py builds it with sanitizers. Arrays are exactly as large as the contract says, on the heap, so
// that AddressSanitizer sees a read past any end; several callers at once give ThreadSanitizer its work.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace {

using Random = std::mt19937;

int below(Random& random, int n) { return random() % n; }

template <class T>
T one_of(Random& random, std::initializer_list<T> all) {
  return all.begin()[below(random, all.size())];
}

// A packed matrix whose groups lie along the last axis: `rows` rows of `width` values.
struct Packed {
  int rows, width, bits, group_size;
  std::vector<uint8_t> codes;
  std::vector<float> scales, biases;

  Packed(Random& random, int rows, int groups, int bits, int group_size)
      : rows(rows), width(groups * group_size), bits(bits), group_size(group_size),
        codes((size_t)rows * width * bits / 8), scales((size_t)rows * groups), biases(scales.size()) {
    for (uint8_t& c : codes) c = random();
    for (float& s : scales) s = (below(random, 2000) - 1000) / 1e5f;
    for (float& b : biases) b = (below(random, 2000) - 1000) / 1e4f;
  }

  double value(int row, int i) const {
    const size_t bit = ((size_t)row * width + i) * bits;
    unsigned two = codes[bit / 8];
    if (bit / 8 + 1 < codes.size()) two |= codes[bit / 8 + 1] << 8;
    const unsigned code = two >> bit % 8 & ((1u << bits) - 1);
    const size_t group = ((size_t)row * width + i) / group_size;
    return (double)code * scales[group] + biases[group];
  }

  Tile tile() const {
    return {codes.data(), (size_t)width * bits / 8, scales.data(), biases.data(), (size_t)width / group_size,
            FLOAT32, width / group_size, group_size, bits};
  }
};

std::vector<float> values(Random& random, int n) {
  std::vector<float> x(n);
  for (float& v : x) v = (below(random, 2000) - 1000) / 500.0f;
  return x;
}

// Sums in double, with the squares of their terms: where terms cancel, their size is what rounding goes by.
struct Sums {
  std::vector<double> want;
  double squares = 1e-30;
  explicit Sums(size_t n) : want(n) {}
  void add(size_t i, double term) {
    want[i] += term;
    squares += term * term;
  }
};

bool close(const char* what, const std::vector<float>& y, const Sums& sums, const Packed* p,
           double tolerance = 1e-5) {
  double error = 0, size = sums.squares;
  for (size_t i = 0; i < sums.want.size(); ++i) error += (y[i] - sums.want[i]) * (y[i] - sums.want[i]);
  if (error <= tolerance * tolerance * size) return true;
  std::printf("%s %s: error %g", kernels().name, what, std::sqrt(error / size));
  if (p) std::printf(" rows %d width %d bits %d group %d", p->rows, p->width, p->bits, p->group_size);
  std::printf("\n");
  return false;
}

struct Stripes {
  Tile tile;
  Active active;
  int stripes;
  std::vector<float>* partials;
};

void run_stripe(void* context, int s) {
  const Stripes& job = *static_cast<Stripes*>(context);
  const int first = job.active.count * s / job.stripes, last = job.active.count * (s + 1) / job.stripes;
  float* partial = job.partials->data() + s * partial_size(job.tile.groups, job.tile.group_size);
  kernels().gemv(job.tile, {job.active.channel + first, job.active.x + first, last - first}, partial);
}

bool sparse_gemv(Random& random) {
  const int group_size = one_of(random, {32, 64, 128}), bits = one_of(random, {2, 3, 4, 5, 6, 8});
  const Packed w(random, 1 + below(random, 70), 1 + below(random, 640 / group_size), bits, group_size);
  const auto x = values(random, w.rows);
  const bool each = below(random, 2);
  std::vector<float> thresholds(each ? w.rows : 1);
  for (float& t : thresholds) t = one_of(random, {0.0f, 0.5f, 1.5f, 9.0f});
  std::vector<int32_t> channel(w.rows);
  std::vector<float> kept(w.rows);
  const Input input{x.data(), FLOAT32, 1, w.rows, thresholds.data(), each};
  const int count = kernels().collect(input, channel.data(), kept.data());
  const int stripes = 1 + below(random, 4), outputs = w.width - below(random, group_size);
  std::vector<float> partials(stripes * partial_size(w.width / group_size, group_size)), y(outputs);
  Stripes job{w.tile(), {channel.data(), kept.data(), count}, stripes, &partials};
  parallel(stripes, run_stripe, &job);
  kernels().finish(job.tile, partials.data(), stripes, {y.data(), FLOAT32, outputs, nullptr, FLOAT32});
  Sums want(outputs);
  for (int k = 0; k < w.rows; ++k)
    if (!(std::fabs(x[k]) < thresholds[each ? k : 0]))
      for (int j = 0; j < outputs; ++j) want.add(j, x[k] * w.value(k, j));
  return close("gemv", y, want, &w, 1e-5);
}

bool many_rows(Random& random) {
  const int group_size = one_of(random, {32, 64, 128}), bits = one_of(random, {2, 3, 4, 5, 6, 8});
  const bool along_inputs = below(random, 2);
  const Packed w(random, 1 + below(random, along_inputs ? 60 : 600), 1 + below(random, 5), bits, group_size);
  const int rows = 1 + below(random, 30), inputs = along_inputs ? w.width : w.rows;
  const int all = along_inputs ? w.rows : w.width, first = below(random, (all + 31) / 32) * 32;
  const int outputs = std::min(GEMM_OUTPUTS, all - first);
  const auto x = values(random, rows * inputs);
  std::vector<float> y(rows * outputs), work(WORK);
  kernels().gemm({x.data(), inputs, rows, inputs, w.tile(), first, along_inputs,
                  {y.data(), FLOAT32, outputs, nullptr, FLOAT32}, outputs},
                 work.data());
  Sums want(y.size());
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < inputs; ++k)
      for (int j = 0; j < outputs; ++j)
        want.add(r * outputs + j,
                 x[r * inputs + k] * (along_inputs ? w.value(first + j, k) : w.value(k, first + j)));
  return close(along_inputs ? "gemm of rows" : "gemm", y, want, &w);
}

bool one_row(Random& random) {
  const int group_size = one_of(random, {32, 64, 128}), bits = one_of(random, {2, 3, 4, 5, 6, 8});
  const Packed w(random, 1 + below(random, 40), 1 + below(random, 12), bits, group_size);
  const auto x = values(random, w.width);
  std::vector<float> prepared(prepared_size(w.width)), sums(w.width / group_size);
  std::vector<float> scales(sums.size() + PADDING), y(w.rows);
  kernels().prepare({x.data(), FLOAT32, 1, w.width, nullptr, 0}, bits, group_size, prepared.data(), sums.data());
  kernels().rows({w.tile(), w.width, 0, w.rows, prepared.data(), sums.data(),
                  {y.data(), FLOAT32, w.rows, nullptr, FLOAT32}},
                 scales.data());
  Sums want(w.rows);
  for (int m = 0; m < w.rows; ++m)
    for (int k = 0; k < w.width; ++k) want.add(m, x[k] * w.value(m, k));
  return close("rows", y, want, &w);
}

bool attention(Random& random) {
  const int width = 16 * (1 + below(random, 8)), many = below(random, 2);
  const int rows = 1 + below(random, many ? ATTEND_ROWS : 5);
  const int keys = many ? rows + below(random, 200) : 1 + below(random, SPLIT_KEYS);
  const auto q = values(random, rows * width), k = values(random, keys * width), v = values(random, keys * width);
  std::vector<float> y(q.size()), top(rows), sum(rows), work(WORK);
  Attend a{q.data(), k.data(), v.data(), width, width, width, rows, keys, width, 0.2f,
           many ? keys - rows + 1 : keys, many, y.data(), width, top.data(), sum.data()};
  (many ? kernels().attend_many : kernels().attend_few)(a, work.data());
  Sums want(y.size());
  for (int r = 0; r < rows; ++r) {
    const int seen = many ? keys - rows + 1 + r : keys;
    std::vector<double> p(seen);
    double highest = -1e300, total = 0;
    for (int j = 0; j < seen; ++j) {
      for (int d = 0; d < width; ++d) p[j] += 0.2 * q[r * width + d] * k[j * width + d];
      highest = std::max(highest, p[j]);
    }
    for (double& one : p) total += one = std::exp(one - highest);
    for (int j = 0; j < seen; ++j)
      for (int d = 0; d < width; ++d) want.add(r * width + d, p[j] / total * v[j * width + d]);
    if (!many)
      for (int d = 0; d < width; ++d) y[r * width + d] /= sum[r];
  }
  return close(many ? "attend_many" : "attend_few", y, want, nullptr);
}

// silu(gate) * up, at any length, with values where e^-g ends at 0 and at infinity
bool gated(Random& random) {
  const int n = 1 + below(random, 70);
  auto gate = values(random, n);
  const auto up = values(random, n);
  for (float& g : gate) g *= one_of(random, {1.0f, 1.0f, 20.0f, 60.0f});
  Sums want(n);
  for (int i = 0; i < n; ++i) want.add(i, gate[i] / (1 + std::exp(-(double)gate[i])) * up[i]);
  kernels().gate(gate.data(), up.data(), n);
  return close("gate", gate, want, nullptr);
}

bool sum_of_exponentials(Random& random) {
  const int n = 1 + below(random, 200);
  auto x = values(random, n);
  const float offset = one_of(random, {0.0f, -300.0f, 1e4f});
  for (float& v : x) v = v * one_of(random, {1.0f, 30.0f}) + offset;
  const bool nan = below(random, 4) == 0;
  if (nan) x[below(random, n)] = std::nanf("");
  std::vector<float> found(2);
  kernels().sum_exp(x.data(), n, &found[0], &found[1]);
  if (nan) return std::isnan(found[0]) && std::isnan(found[1]);
  const float top = *std::max_element(x.begin(), x.end());
  Sums want(1);
  for (float v : x) want.add(0, std::exp((double)v - top));
  return found[0] == top && close("sum_exp", {found[1]}, want, nullptr);
}

int rounds(unsigned seed, int count) {
  Random random(seed);
  int wrong = 0;
  for (int i = 0; i < count; ++i)
    wrong += !sparse_gemv(random) + !many_rows(random) + !one_row(random) + !attention(random) + !gated(random) +
             !sum_of_exponentials(random);
  return wrong;
}

}  // namespace

// fuzz ROUNDS
int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100;
  int wrong = 0;
  for (const char* name : {"base", "avx2", "avx512"}) {
    if (!use_isa(name)) continue;
    set_threads(4);
    int other = 0;
    std::thread caller([&] { other = rounds(1, count); });
    wrong += rounds(2, count);
    set_threads(2);
    caller.join();
    wrong += other;
    std::printf("%s: %d rounds\n", name, 2 * count);
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
