// Many rows: a panel of weights is made float once, in L2, and multiplied by all rows of the task.
//
// A panel holds GEMM_INPUTS channels of GEMM_OUTPUTS outputs as slabs of two vectors of outputs,
// slab[k][output]. A row tile keeps ROWS x 2 accumulators in registers. Every output is one chain of
// fused multiply-adds in the order of k, so it depends on neither threads nor its neighbours.
#pragma once

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROW_TILE = 12;  // 24 of 32 registers
#else
constexpr int ROW_TILE = 6;  // 12 of 16
#endif
constexpr int SLAB = 2 * LANES;

// what brings codes down that were masked in place
template <int BITS, int... I>
SPQT_INLINE vf unshift(int v, std::integer_sequence<int, I...>) {
  const vf odd = {(1.0f / (1 << ByteCodec<BITS>::shift(0, 1, I)))...};
  const vf even = {(1.0f / (1 << ByteCodec<BITS>::shift(0, 0, I)))...};
  return v % 2 ? odd : even;
}

constexpr auto ALL_LANES = std::make_integer_sequence<int, LANES>();
constexpr auto UNIT_VECTORS = std::make_integer_sequence<int, 32 / LANES>();

// use(v, code) for the vectors of 32 codes in their order, code times the lane's shift
template <int BITS, class Use, int... V>
SPQT_INLINE void unpack_unit(const uint8_t* p, Use use, std::integer_sequence<int, V...>) {
  (use(V, ByteCodec<BITS>::template unpack_vector<V>(p, std::make_integer_sequence<int, LANES * 4>(),
                                                     ALL_LANES)),
   ...);
}

SPQT_INLINE float* slab_of(float* panel, int output) { return panel + output / SLAB * GEMM_INPUTS * SLAB; }

constexpr int CHANNELS_AHEAD = 64;  // hardware does not follow strides of a chunk

// Groups along the outputs: vectors of outputs are what the slab wants.
template <int BITS, Type T>
static void fill_zigzag(const Gemm& g, int first_input, int inputs, float* panel) {
  const Tile& w = g.weights;
  for (int n = 0; n < g.out.outputs; n += 32) {
    const int group = (g.first + n) / w.group_size;
    const uint8_t* codes = w.codes + (size_t)(g.first + n) / 8 * BITS;
    for (int k = 0; k < inputs; ++k) {
      const int64_t channel = first_input + k;
      const vf scale = splat(scalar<T>(w.scales, channel * w.scale_stride + group));
      const vf bias = splat(scalar<T>(w.biases, channel * w.scale_stride + group));
      prefetch(codes + (channel + CHANNELS_AHEAD) * w.code_stride);
      auto put_vector = [&](int v, vf code) __attribute__((always_inline)) {
        const int output = n + v * LANES;
        store(slab_of(panel, output) + k * SLAB + output % SLAB,
              code * (scale * unshift<BITS>(v, ALL_LANES)) + bias);
      };
      unpack_unit<BITS>(codes + channel * w.code_stride, put_vector, UNIT_VECTORS);
    }
  }
}

// Groups along the inputs: vectors of inputs, scattered over the rows of the slab.
template <int BITS, Type T>
static void fill_rows(const Gemm& g, int first_input, int inputs, float* panel) {
  const Tile& w = g.weights;
  for (int n = 0; n < g.out.outputs; ++n) {
    const int64_t row = g.first + n;
    float* to = slab_of(panel, n) + n % SLAB;
    for (int k = 0; k < inputs; k += 32) {
      const int64_t group = row * w.scale_stride + (first_input + k) / w.group_size;
      const vf scale = splat(scalar<T>(w.scales, group)), bias = splat(scalar<T>(w.biases, group));
      auto put_vector = [&](int v, vf code) __attribute__((always_inline)) {
        float lanes[LANES];
        store(lanes, code * (scale * unshift<BITS>(v, ALL_LANES)) + bias);
        for (int l = 0; l < LANES; ++l) to[(k + v * LANES + l) * SLAB] = lanes[l];
      };
      unpack_unit<BITS>(w.codes + row * w.code_stride + (size_t)(first_input + k) / 8 * BITS, put_vector,
                        UNIT_VECTORS);
    }
  }
}

template <int BITS>
static void fill_bits(const Gemm& g, int first_input, int inputs, float* panel) {
  const Type t = g.weights.type;
  auto fill = g.along_inputs
      ? (t == FLOAT32 ? fill_rows<BITS, FLOAT32> : t == FLOAT16 ? fill_rows<BITS, FLOAT16> : fill_rows<BITS, BFLOAT16>)
      : (t == FLOAT32 ? fill_zigzag<BITS, FLOAT32>
             : t == FLOAT16 ? fill_zigzag<BITS, FLOAT16> : fill_zigzag<BITS, BFLOAT16>);
  fill(g, first_input, inputs, panel);
}

static void fill(const Gemm& g, int first_input, int inputs, float* panel) {
  switch (g.weights.bits) {
    case 2: return fill_bits<2>(g, first_input, inputs, panel);
    case 3: return fill_bits<3>(g, first_input, inputs, panel);
    case 4: return fill_bits<4>(g, first_input, inputs, panel);
    case 5: return fill_bits<5>(g, first_input, inputs, panel);
    case 6: return fill_bits<6>(g, first_input, inputs, panel);
    case 8: return fill_bits<8>(g, first_input, inputs, panel);
  }
}

// sums[row][output] += x[row][k] * slab[k][output]; rows of sums lie `width` apart
template <int ROWS>
SPQT_INLINE void multiply_tile(const float* x, int64_t x_stride, int inputs, const float* slab, float* sums,
                               int width) {
  vf left[ROWS], right[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    left[r] = load<vf>(sums + r * width);
    right[r] = load<vf>(sums + r * width + LANES);
  }
  for (int k = 0; k < inputs; ++k) {
    const vf a = load<vf>(slab + k * SLAB), b = load<vf>(slab + k * SLAB + LANES);
    for (int r = 0; r < ROWS; ++r) {
      const vf one = splat(x[r * x_stride + k]);
      left[r] += one * a;
      right[r] += one * b;
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    store(sums + r * width, left[r]);
    store(sums + r * width + LANES, right[r]);
  }
}

// The last rows, fewer than a tile.
template <int ROWS>
static void multiply_rest(int rows, const float* x, int64_t x_stride, int inputs, const float* slab,
                          float* sums, int width) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return multiply_tile<ROWS>(x, x_stride, inputs, slab, sums, width);
    multiply_rest<ROWS - 1>(rows, x, x_stride, inputs, slab, sums, width);
  }
}

// All rows by one slab.
static void multiply_slab(int rows, const float* x, int64_t x_stride, int inputs, const float* slab,
                          float* sums, int width) {
  int row = 0;
  for (; row + ROW_TILE <= rows; row += ROW_TILE)
    multiply_tile<ROW_TILE>(x + row * x_stride, x_stride, inputs, slab, sums + row * width, width);
  multiply_rest<ROW_TILE - 1>(rows - row, x + row * x_stride, x_stride, inputs, slab, sums + row * width, width);
}

// panels are filled by 32 outputs, slabs are read whole
static_assert(32 % SLAB == 0 && GEMM_OUTPUTS % 32 == 0 && (GEMM_INPUTS + GEMM_ROWS) * GEMM_OUTPUTS <= WORK);

static void gemm(const Gemm& g, float* work) {
  float* panel = work;
  float* sums = work + GEMM_OUTPUTS * GEMM_INPUTS;
  for (int i = 0; i < g.rows * GEMM_OUTPUTS; i += LANES) store(sums + i, vf{});
  for (int k = 0; k < g.inputs; k += GEMM_INPUTS) {
    const int inputs = min_of(GEMM_INPUTS, g.inputs - k);
    fill(g, k, inputs, panel);
    for (int n = 0; n < g.out.outputs; n += SLAB)
      multiply_slab(g.rows, g.x + k, g.x_stride, inputs, slab_of(panel, n), sums + n, GEMM_OUTPUTS);
  }
  for (int row = 0; row < g.rows; ++row) {
    Output out = g.out;
    out.y = (uint8_t*)g.out.y + row * g.y_stride * (g.out.type == FLOAT32 ? 4 : 2);
    put_row(out, 0, g.out.outputs, sums + row * GEMM_OUTPUTS);
  }
}
