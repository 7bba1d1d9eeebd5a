// What decoding needs besides matrices: RMS normalization, rotary positions, attention.
#pragma once

static void rms_norm(const Norm& n) {
  for (int row = 0; row < n.rows; ++row) {
    const float* x = n.x + (int64_t)row * n.width;
    float* y = n.y + (int64_t)row * n.width;
    vf squares[4] = {};  // four chains hide the latency of the multiply-add
    float rest = 0;
    int i = 0;
    for (; i + 4 * LANES <= n.width; i += 4 * LANES)
      for (int c = 0; c < 4; ++c) {
        vf part = load<vf>(x + i + c * LANES);
        squares[c] += part * part;
      }
    for (; i < n.width; ++i) rest += x[i] * x[i];
    float sum = add_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest;
    const float factor = 1.0f / __builtin_sqrtf(sum / n.width + n.eps);
    if (n.weight)
      for (i = 0; i < n.width; ++i) y[i] = x[i] * factor * n.weight[i];
    else
      for (i = 0; i < n.width; ++i) y[i] = x[i] * factor;
  }
}

static void rope(const Rope& r) {
  for (int p = 0; p < r.positions; ++p) {
    const float* __restrict x = r.x + p * r.x_stride;
    float* __restrict y = r.y + p * r.y_stride;
    const float* cosines = r.table + (int64_t)p * 2 * r.half;
    const float* sines = cosines + r.half;
    const int second = r.traditional ? 1 : r.half, step = r.traditional ? 2 : 1;
    for (int i = 0; i < r.half; ++i) {
      const float a = x[i * step], b = x[i * step + second];
      y[i * step] = a * cosines[i] - b * sines[i];
      y[i * step + second] = a * sines[i] + b * cosines[i];
    }
    for (int i = 2 * r.half; i < r.width; ++i) y[i] = x[i];
  }
}

// e^x for x <= 0, to 2 units in the last place; below -87 it is 0, as it is next to the largest term.
SPQT_INLINE vf exp_negative(vf x) {
  const vf low = splat(-87.0f);
  const vi is_tiny = x < low;
  const vf magic = splat(0x1.8p23f);  // adding it rounds to an integer, left in the low bits
  x = is_tiny ? low : x;  // this way round NaN stays
  vf shifted = x * splat(1.44269504f) + magic;
  vf n = shifted - magic;
  vf r = x - n * splat(0.693359375f);  // ln 2 in two parts: the first is exact in n * ln 2
  r -= n * splat(-2.12194440e-4f);
  vf p = splat(1.0f / 5040);  // Taylor: |r| < 0.35, so the next term is below 2^-27
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  vf result = (vf)((vi)p + ((vi)shifted << 23));
  return (vf)((vi)result & ~is_tiny);
}

// g / (1 + e^-g) * u; e^-|g| can't overflow
SPQT_INLINE vf silu_times(vf g, vf u) {
  const vf e = exp_negative((vf)((vi)g | (vi)splat(-0.0f)));
  const vi below = g < vf{};
  return g * (below ? e : splat(1.0f)) / (splat(1.0f) + e) * u;
}

static void gate(float* g, const float* u, int n) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(g + i, silu_times(load<vf>(g + i), load<vf>(u + i)));
  if (i == n) return;
  float last[2][LANES] = {};
  for (int j = i; j < n; ++j) {
    last[0][j - i] = g[j];
    last[1][j - i] = u[j];
  }
  store(last[0], silu_times(load<vf>(last[0]), load<vf>(last[1])));
  for (int j = i; j < n; ++j) g[j] = last[0][j - i];
}

static void sum_exp(const float* x, int n, float* largest, float* sum) {
  vf tops = splat(x[0]), all = {};
  vi odd = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vf v = load<vf>(x + i);
    tops = v > tops ? v : tops;
    odd |= v != v;
  }
  float top = x[0];
  bool nan = false;
  for (int l = 0; l < LANES; ++l) {
    top = tops[l] > top ? tops[l] : top;
    nan |= odd[l] != 0;
  }
  for (int j = i; j < n; ++j) {
    top = x[j] > top ? x[j] : top;
    nan |= x[j] != x[j];
  }
  *largest = nan ? __builtin_nanf("") : top;
  for (i = 0; i + LANES <= n; i += LANES) all += exp_negative(load<vf>(x + i) - splat(top));
  *sum = add_lanes(all);
  for (; i < n; ++i) *sum += exp_negative(splat(x[i] - top))[0];
  if (nan) *sum = *largest;
}

// scores -> exp(scores - top), in place; returns their sum. n is a multiple of LANES.
SPQT_INLINE float exp_row(float* scores, int n, float top) {
  vf sum = {};
  for (int i = 0; i < n; i += LANES) {
    vf e = exp_negative(load<vf>(scores + i) - splat(top));
    store(scores + i, e);
    sum += e;
  }
  return add_lanes(sum);
}

SPQT_INLINE float top_of(const float* scores, int n) {
  float top = scores[0];
  for (int i = 1; i < n; ++i) top = scores[i] > top ? scores[i] : top;
  return top;
}

constexpr float HIDDEN = -__builtin_inff();

SPQT_INLINE int64_t place_of(const Attend& a, int key) { return a.places ? a.places[key] : key; }

// y[d ...] = sum over keys of weight * value, for N vectors
template <int N>
SPQT_INLINE void weigh_values(const Attend& a, const float* weights, int d, float* y) {
  vf sums[N] = {};
  for (int j = 0; j < a.keys; ++j) {
    const vf weight = splat(weights[j]);
    const float* v = a.v + place_of(a, j) * a.v_stride + d;
    for (int i = 0; i < N; ++i) sums[i] += weight * load<vf>(v + i * LANES);
  }
  for (int i = 0; i < N; ++i) store(y + d + i * LANES, sums[i]);
}

// Few rows, all of which see every key: one pass for the scores and one for the values.
static void attend_few(const Attend& a, float* scores) {
  const int padded = (a.keys + LANES - 1) / LANES * LANES;
  for (int row = 0; row < a.rows; ++row) {
    const float* q = a.q + row * a.q_stride;
    for (int j = 0; j < a.keys; ++j) {
      const float* k = a.k + place_of(a, j) * a.k_stride;
      vf even = {}, odd = {};
      for (int d = 0; d < a.width; d += 2 * LANES) {
        even += load<vf>(q + d) * load<vf>(k + d);
        if (d + LANES < a.width) odd += load<vf>(q + d + LANES) * load<vf>(k + d + LANES);
      }
      scores[j] = add_lanes(even + odd) * a.scale;
    }
    for (int j = a.keys; j < padded; ++j) scores[j] = HIDDEN;
    a.top[row] = top_of(scores, a.keys);
    a.sum[row] = exp_row(scores, padded, a.top[row]);
    float* y = a.y + row * a.y_stride;
    int d = 0;
    for (; d + 8 * LANES <= a.width; d += 8 * LANES) weigh_values<8>(a, scores, d, y);
    for (; d + 4 * LANES <= a.width; d += 4 * LANES) weigh_values<4>(a, scores, d, y);
    for (; d < a.width; d += LANES) weigh_values<1>(a, scores, d, y);
  }
}

// The width as whole slabs, which is what products are of.
SPQT_INLINE int slabs_of(int width) { return (width + SLAB - 1) / SLAB * SLAB; }

// keys and values of one panel as slabs: keys_t[d][key], values[key][d]; zeros for keys past the last and, in the
// last slab of values, past the width
SPQT_INLINE void fill_panel(const Attend& a, int first, int keys, float* keys_t, float* values) {
  const int length = slabs_of(a.width);
  for (int j = 0; j < ATTEND_KEYS; ++j) {
    const float* k = a.k + (first + j) * a.k_stride;
    const float* v = a.v + (first + j) * a.v_stride;
    float* column = keys_t + j / SLAB * a.width * SLAB + j % SLAB;
    float* row = values + j * SLAB;
    for (int d = 0; d < a.width; ++d) {
      column[d * SLAB] = j < keys ? k[d] : 0;
      row[d / SLAB * ATTEND_KEYS * SLAB + d % SLAB] = j < keys ? v[d] : 0;
    }
    for (int d = a.width; d < length; ++d) row[d / SLAB * ATTEND_KEYS * SLAB + d % SLAB] = 0;
  }
}

static_assert(ATTEND_WIDTH % SLAB == 0 && ATTEND_KEYS % SLAB == 0 && SPLIT_KEYS <= WORK &&
              2 * ATTEND_WIDTH * ATTEND_KEYS + ATTEND_ROWS * (ATTEND_KEYS + ATTEND_WIDTH) <= WORK);

// Many rows: panels of keys, a running maximum, sums rescaled when it rises. Rows of sums are whole
// slabs, or the last product would write into the next row.
static void attend_many(const Attend& a, float* work) {
  float* keys_t = work;
  float* values = keys_t + ATTEND_WIDTH * ATTEND_KEYS;
  float* scores = values + ATTEND_WIDTH * ATTEND_KEYS;
  float* sums = scores + ATTEND_ROWS * ATTEND_KEYS;
  const int length = slabs_of(a.width);
  for (int row = 0; row < a.rows; ++row) {
    a.top[row] = HIDDEN;
    a.sum[row] = 0;
    for (int d = 0; d < length; d += LANES) store(sums + row * length + d, vf{});
  }
  const int seen = min_of(a.keys, a.visible + (a.rows - 1) * a.visible_step);
  for (int first = 0; first < seen; first += ATTEND_KEYS) {
    const int keys = min_of(ATTEND_KEYS, seen - first);
    fill_panel(a, first, keys, keys_t, values);
    for (int i = 0; i < a.rows * ATTEND_KEYS; i += LANES) store(scores + i, vf{});
    for (int j = 0; j < ATTEND_KEYS; j += SLAB)
      multiply_slab(a.rows, a.q, a.q_stride, a.width, keys_t + j * a.width, scores + j, ATTEND_KEYS);
    for (int row = 0; row < a.rows; ++row) {
      float* s = scores + row * ATTEND_KEYS;
      const int shown = min_of(keys, a.visible + row * a.visible_step - first);
      for (int j = 0; j < ATTEND_KEYS; ++j) s[j] = j < shown ? s[j] * a.scale : HIDDEN;
      const float here = top_of(s, ATTEND_KEYS);
      if (here > a.top[row]) {
        const float shrink = exp_negative(splat(a.top[row] - here))[0];
        a.sum[row] *= shrink;
        for (int d = 0; d < a.width; d += LANES)
          store(sums + row * length + d, load<vf>(sums + row * length + d) * splat(shrink));
        a.top[row] = here;
      }
      a.sum[row] += exp_row(s, ATTEND_KEYS, a.top[row]);
    }
    for (int d = 0; d < a.width; d += SLAB)
      multiply_slab(a.rows, scores, ATTEND_KEYS, ATTEND_KEYS, values + d * ATTEND_KEYS, sums + d, length);
  }
  for (int row = 0; row < a.rows; ++row)
    for (int d = 0; d < a.width; d += LANES)
      store(a.y + row * a.y_stride + d, load<vf>(sums + row * length + d) * splat(1.0f / a.sum[row]));
}
