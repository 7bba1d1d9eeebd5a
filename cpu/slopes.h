// The way back through a layer: slopes by its inputs, and what slopes by the scales of its groups are made of.
//
// Both are sums over P[row][input], one group's outputs of slope * weight: dx adds P up over groups, dots adds x * P up
// over rows. So one product that is cut at groups gives both. Vectors run along inputs: a group's weights are
// transposed once, slab[output][input], and multiplied by all rows. x and dx of the slab's inputs lie in scratch
// meanwhile, row after row: in their own arrays rows of some widths share their places in the caches. Included after
// gemm.h.
#pragma once

static_assert(SLOPE_ROWS % ROW_TILE == 0 && SLOPE_INPUTS % SLAB == 0 && MOST_SLOPE_ROWS % SLOPE_ROWS == 0 &&
              (2 * MOST_SLOPE_ROWS + 128) * SLAB <= WORK);
constexpr int SLOPE_ROWS_AHEAD = 16;  // a row of x is prefetched before it is copied

// lanes of a and b in turn, of their lower or upper halves
template <int HALF, int... I>
SPQT_INLINE vf interleave(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (HALF * LANES / 2 + I / 2 + I % 2 * LANES)...);
#else
  return __builtin_shuffle(a, b, (vi){(HALF * LANES / 2 + I / 2 + I % 2 * LANES)...});
#endif
}

SPQT_INLINE void transpose(vf (&v)[LANES]) {
  for (int step = 1; step < LANES; step *= 2) {
    vf next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = interleave<0>(v[i], v[i + LANES / 2], ALL_LANES);
      next[2 * i + 1] = interleave<1>(v[i], v[i + LANES / 2], ALL_LANES);
    }
    for (int i = 0; i < LANES; ++i) v[i] = next[i];
  }
}

// slab[output][input] from w[input][output], rows `band` apart; zeros for the inputs that there are not
static void fill_slab(const float* w, int64_t band, int inputs, int size, float* slab) {
  for (int i = 0; i < SLAB; i += LANES)
    for (int o = 0; o < size; o += LANES) {
      vf v[LANES];
      for (int l = 0; l < LANES; ++l) v[l] = i + l < inputs ? load<vf>(w + (i + l) * band + o) : vf{};
      transpose(v);
      for (int l = 0; l < LANES; ++l) store(slab + (o + l) * SLAB + i, v[l]);
    }
}

// One group for all rows.
template <int SIZE>
static void multiply_group(int rows, const float* dy, const float* slab, const float* x, float* dx, vf (&dots)[2]) {
  for (int row = 0; row < rows; row += ROW_TILE) {
    vf left[ROW_TILE] = {}, right[ROW_TILE] = {};
    for (int k = 0; k < SIZE; ++k) {
      const vf a = load<vf>(slab + k * SLAB), b = load<vf>(slab + k * SLAB + LANES);
      for (int r = 0; r < ROW_TILE; ++r) {
        const vf one = splat(dy[r * SIZE + k]);
        left[r] += one * a;
        right[r] += one * b;
      }
    }
    for (int r = 0; r < ROW_TILE; ++r) {
      store(dx + r * SLAB, load<vf>(dx + r * SLAB) + left[r]);
      store(dx + r * SLAB + LANES, load<vf>(dx + r * SLAB + LANES) + right[r]);
      dots[0] += load<vf>(x + r * SLAB) * left[r];
      dots[1] += load<vf>(x + r * SLAB + LANES) * right[r];
    }
    dy += ROW_TILE * SIZE, x += ROW_TILE * SLAB, dx += ROW_TILE * SLAB;
  }
}

// All groups for one slab of inputs.
template <int SIZE>
static void slopes_of_slab(const Slopes& s, int input, float* work) {
  const int inputs = min_of(SLAB, s.inputs - input), rows = slope_rows(s.rows), groups = s.band / SIZE;
  float *x = work, *dx = x + rows * SLAB, *slab = dx + rows * SLAB;
  for (int i = 0; i < rows * SLAB; i += LANES) store(x + i, vf{}), store(dx + i, vf{});
  for (int r = 0; r < s.rows; ++r) {
    prefetch(s.x + (int64_t)min_of(r + SLOPE_ROWS_AHEAD, s.rows - 1) * s.inputs + input);
    __builtin_memcpy(x + r * SLAB, s.x + (int64_t)r * s.inputs + input, inputs * sizeof(float));
  }
  const float* dy = s.dy;
  for (int band = 0; band < s.bands; ++band)
    for (int group = 0; group < groups; ++group, dy += rows * SIZE) {
      const int64_t first = (int64_t)band * s.inputs + input;
      fill_slab(s.w + first * s.band + group * SIZE, s.band, inputs, SIZE, slab);
      vf sums[2] = {};
      multiply_group<SIZE>(rows, dy, slab, x, dx, sums);
      for (int i = 0; i < inputs; ++i) {
        float* to = s.dots + (first + i) * groups + group;
        const float sum = sums[i / LANES][i % LANES];
        *to = s.adds ? *to + sum : sum;
      }
    }
  for (int r = 0; r < s.rows; ++r)
    __builtin_memcpy(s.dx + (int64_t)r * s.inputs + input, dx + r * SLAB, inputs * sizeof(float));
}

static void slopes(const Slopes& s, float* work) {
  auto of_slab = s.group_size == 32 ? slopes_of_slab<32>
      : s.group_size == 64 ? slopes_of_slab<64> : slopes_of_slab<128>;
  const int last = min_of(s.first + SLOPE_INPUTS, s.inputs);
  for (int input = s.first; input < last; input += SLAB) of_slab(s, input, work);
}
