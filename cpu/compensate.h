// Input channels of one group of outputs rounded one after another, as spqt_cli/fit/compensate.py and grid.py define
// it. The order of sums is theirs, but for the products of earlier channels, so results are equal for every
// instruction set. Included only by exact.cpp, after simd.h.
#pragma once

constexpr int SPAN = 64;     // channels whose errors are passed on one by one
constexpr int PANEL = 128;   // earlier channels multiplied together
constexpr float CLIPPED[] = {0.0f, 0.03f, 0.06f, 0.1f};
constexpr int REFITS = 3;
constexpr float LEAST_SCALE = 1e-7f;

static_assert(SPAN * 128 + PANEL * SPAN <= WORK);

template <int N>
struct Values {
  vf v[N];
};

// The sum of all elements, halves added.
template <int N>
SPQT_INLINE float add_all(Values<N> a) {
  for (int half = N / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return add_lanes(a.v[0]);
}

SPQT_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
SPQT_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

SPQT_INLINE float stored(float value, Type type) {
#if defined(__F16C__)
  if (type == FLOAT16) return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#endif
  uint16_t raw;
  if (type == FLOAT32) return value;
  if (type == FLOAT16) return put<FLOAT16>(&raw, 0, value), element<FLOAT16>(&raw, 0);
  return put<BFLOAT16>(&raw, 0, value), element<BFLOAT16>(&raw, 0);
}

// One group's scale and bias, and with `keep` its codes and their values.
template <int N>
struct Found {
  float scale, bias, squares;
  Values<N> codes, values;
};

template <int N>
SPQT_INLINE Found<N> encoded(const Values<N>& x, float scale, float bias, float most) {
  Found<N> found{scale, bias, 0, {}, {}};
  Values<N> squares;
  const vf inverse = splat(1.0f / scale), integers = splat(0x1.8p23f);  // added and taken off: rounded to even
  for (int i = 0; i < N; ++i) {
    const vf code = smaller(larger((x.v[i] - splat(bias)) * inverse, vf{}), splat(most));
    found.codes.v[i] = (code + integers) - integers;
    found.values.v[i] = found.codes.v[i] * splat(scale) + splat(bias);
    const vf off = found.values.v[i] - x.v[i];
    squares.v[i] = off * off;
  }
  found.squares = add_all(squares);
  return found;
}

template <int N>
SPQT_INLINE float least(const Values<N>& x) {
  vf found = x.v[0];
  for (int i = 1; i < N; ++i) found = smaller(x.v[i], found);
  float one = found[0];
  for (int l = 1; l < LANES; ++l) one = found[l] < one ? found[l] : one;
  return one;
}

template <int N>
SPQT_INLINE Values<N> negated(Values<N> x) {
  for (int i = 0; i < N; ++i) x.v[i] = -x.v[i];
  return x;
}

template <int N>
SPQT_INLINE Found<N> search(const Values<N>& x, int bits, Type type) {
  const float most = (1 << bits) - 1, part = 1.0f / most, mean_of = 1.0f / (N * LANES);
  const float low = least(x) + 0.0f, high = -least(negated(x)) + 0.0f, span = high - low;
  float scale = __builtin_nanf(""), bias = scale, squares = __builtin_inff();
  for (float below : CLIPPED) {
    const float first = low + span * below, rounded = stored(first, type);
    for (float above : CLIPPED) {
      const float step = (high - span * above - first) * part;
      const Found<N> one = encoded(x, stored(step > LEAST_SCALE ? step : LEAST_SCALE, type), rounded, most);
      if (one.squares < squares) scale = one.scale, bias = one.bias, squares = one.squares;
    }
  }
  Found<N> best = encoded(x, scale, bias, most);
  const float mean = add_all(x) * mean_of;
  for (int refit = 0; refit < REFITS; ++refit) {
    const float centre = add_all(best.codes) * mean_of;
    Values<N> along, across;
    for (int i = 0; i < N; ++i) {
      const vf off = best.codes.v[i] - splat(centre);
      along.v[i] = off * x.v[i];
      across.v[i] = off * off;
    }
    const float spread = add_all(across), slope = add_all(along) / (spread > 1e-9f ? spread : 1e-9f);
    const float step = stored(__builtin_fabsf(slope) < LEAST_SCALE ? best.scale : slope, type);
    const Found<N> one = encoded(x, step, stored(mean - step * centre, type), most);
    if (one.squares < best.squares) best = one;
  }
  return best;
}

// x (end - start, N vectors) += factor[:start, start:end]^T @ errors[:start], terms in their order.
template <int N>
void earlier(const Compensate& job, int start, int end, float* x, float* panel) {
  constexpr int ROWS = 4, WIDE = LANES == 16 && N >= 4 ? 4 : 2, SIZE = N * LANES;
  for (int from = 0; from < start; from += PANEL) {
    const int count = start - from < PANEL ? start - from : PANEL;
    for (int j = 0; j < count; ++j)
      for (int c = 0; c < SPAN; ++c)  // by 64 columns: a row of the factor is a power of two long as often as not
        panel[j * SPAN + c] = start + c < end ? job.factor[(int64_t)(from + j) * job.inputs + start + c] : 0;
    for (int c = 0; c < end - start; c += ROWS)
      for (int n = 0; n < N; n += WIDE) {
        vf sum[ROWS][WIDE];
        for (int r = 0; r < ROWS; ++r)
          for (int i = 0; i < WIDE; ++i) sum[r][i] = load<vf>(x + (c + r) * SIZE + (n + i) * LANES);
        const float* error = job.errors + (int64_t)from * SIZE + n * LANES;
        for (int j = 0; j < count; ++j, error += SIZE)
          for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < WIDE; ++i)
              sum[r][i] += splat(panel[j * SPAN + c + r]) * load<vf>(error + i * LANES);
        for (int r = 0; r < ROWS; ++r)
          for (int i = 0; i < WIDE; ++i) store(x + (c + r) * SIZE + (n + i) * LANES, sum[r][i]);
      }
  }
}

template <int N>
void compensate_group(const Compensate& job, float* work) {
  constexpr int SIZE = N * LANES;
  float *x = work, *panel = work + SPAN * SIZE;
  for (int start = 0; start < job.inputs; start += SPAN) {
    const int end = start + SPAN < job.inputs ? start + SPAN : job.inputs;
    for (int i = 0; i < SPAN * SIZE; ++i) x[i] = 0;
    earlier<N>(job, start, end, x, panel);
    float* targets = job.errors + (int64_t)start * SIZE;
    for (int i = 0; i < (end - start) * SIZE; ++i) x[i] = targets[i] + x[i];
    for (int k = start; k < end; ++k) {
      Values<N> mine, error;
      for (int i = 0; i < N; ++i) mine.v[i] = load<vf>(x + (k - start) * SIZE + i * LANES);
      const Found<N> found = search(mine, job.bits, job.type);
      job.scales[k] = found.scale;
      job.biases[k] = found.bias;
      for (int i = 0; i < N; ++i) {
        float* place = job.errors + (int64_t)k * SIZE + i * LANES;
        const vi codes = __builtin_convertvector(found.codes.v[i], vi);
        for (int l = 0; l < LANES; ++l) job.codes[(int64_t)k * SIZE + i * LANES + l] = (uint8_t)codes[l];
        error.v[i] = load<vf>(place) - found.values.v[i];
        store(place, error.v[i]);
      }
      const float* factor = job.factor + (int64_t)k * job.inputs;
      for (int after = k + 1; after < end; ++after)
        for (int i = 0; i < N; ++i) {
          float* place = x + (after - start) * SIZE + i * LANES;
          store(place, load<vf>(place) + splat(factor[after]) * error.v[i]);
        }
    }
  }
}

void compensate(const Compensate& job, float* work) {
  if (job.group_size == 32) compensate_group<32 / LANES>(job, work);
  else if (job.group_size == 64) compensate_group<64 / LANES>(job, work);
  else compensate_group<128 / LANES>(job, work);
}
