// The dense GEMV of MLX's own layout, groups along the inputs: heads, tied embeddings, skipped layers.
//
// y[m] = sum over g of scale[m, g] * (codes . x) + bias[m, g] * (sum of x in g). x is laid out once per call
// in the order in which codes unpack, divided by the lanes' shifts; each row is then one stream of codes.
#pragma once

template <int BITS>
static void prepare_bits(const Input& in, int group_size, float* prepared, float* group_sums) {
  using C = Codec<BITS>;
  const int columns = (in.inputs + C::COLUMN - 1) / C::COLUMN;
  for (int c = 0; c < columns; ++c)
    for (int pass = 0; pass < C::PASSES; ++pass)
      for (int v = 0; v < VECTORS; ++v)
        for (int l = 0; l < LANES; ++l) {
          const int k = c * C::COLUMN + C::index(pass, v, l);
          const float x = k < in.inputs ? any_element(in.x, in.type, k * in.stride) : 0.0f;
          *prepared++ = x * (1.0f / (1 << C::shift(pass, v, l)));
        }
  for (int g = 0; g < in.inputs / group_size; ++g) {
    group_sums[g] = 0;
    for (int k = g * group_size; k < (g + 1) * group_size; ++k)
      group_sums[g] += any_element(in.x, in.type, k * in.stride);
  }
}

static void prepare(const Input& in, int bits, int group_size, float* prepared, float* group_sums) {
  switch (bits) {
    case 2: return prepare_bits<2>(in, group_size, prepared, group_sums);
    case 3: return prepare_bits<3>(in, group_size, prepared, group_sums);
    case 4: return prepare_bits<4>(in, group_size, prepared, group_sums);
    case 5: return prepare_bits<5>(in, group_size, prepared, group_sums);
    case 6: return prepare_bits<6>(in, group_size, prepared, group_sums);
    case 8: return prepare_bits<8>(in, group_size, prepared, group_sums);
  }
}

template <int BITS, int GROUP, int PASS, bool WHOLE>
SPQT_INLINE vf dot_column(const uint8_t* codes, int part, const float* x, const float* scales, int column) {
  using C = Codec<BITS>;
  vf sums[VECTORS] = {}, scale[VECTORS];  // two sums in turn for lanes of the same groups: shorter chains
  C::template expand<GROUP>(scales, column, scale);
  auto add = [&](int v, vf code) SPQT_LAMBDA {
    sums[v / C::SHARED * C::SHARED + v % 2] += code * load<vf>(x + v * LANES);
  };
  if constexpr (WHOLE)
    C::template unpack<PASS>(codes, add);
  else
    C::template unpack_part<PASS>(codes, part, add);
  vf total = (sums[0] + sums[1]) * scale[0];
  for (int v = C::SHARED; v < VECTORS; v += C::SHARED) total += (sums[v] + sums[v + 1]) * scale[v];
  return total;
}

template <int BITS, int GROUP>
SPQT_INLINE float dot_row(const uint8_t* codes, int inputs, const float* x, const float* scales) {
  using C = Codec<BITS>;
  constexpr int SUMS = VECTORS * LANES;
  const int bytes = inputs / 8 * BITS, columns = bytes / C::COLUMN_BYTES, part = bytes % C::COLUMN_BYTES;
  vf total = {};
  int c = 0;
  for (; c < columns; ++c, codes += C::COLUMN_BYTES, x += C::PASSES * SUMS) {
    total += dot_column<BITS, GROUP, 0, true>(codes, 0, x, scales, c);
    if constexpr (C::PASSES == 2) total += dot_column<BITS, GROUP, 1, true>(codes, 0, x + SUMS, scales, c);
  }
  if (part) {
    total += dot_column<BITS, GROUP, 0, false>(codes, part, x, scales, c);
    if constexpr (C::PASSES == 2) total += dot_column<BITS, GROUP, 1, false>(codes, part, x + SUMS, scales, c);
  }
  return add_lanes(total);
}

// sum of bias * group sum over a row, and the row's scales as float
template <Type T>
SPQT_INLINE float scale_row(const Tile& w, int64_t first, int groups, const float* group_sums, float* scales) {
  vf sum = {};
  int g = 0;
  for (; g + LANES <= groups; g += LANES) {
    store(scales + g, load_as_float<T>(w.scales, first + g));
    sum += load_as_float<T>(w.biases, first + g) * load<vf>(group_sums + g);
  }
  float rest = 0;
  for (; g < groups; ++g) {
    scales[g] = scalar<T>(w.scales, first + g);
    rest += scalar<T>(w.biases, first + g) * group_sums[g];
  }
  return add_lanes(sum) + rest;
}

template <int BITS, int GROUP>
static void rows_tile(const Rows& r, float* scales) {
  const Tile& w = r.weights;
  const int groups = r.inputs / GROUP;
  // the last column multiplies scales of groups that are not there by codes of zero: NaN would spread
  for (int g = groups; g < groups + PADDING; ++g) scales[g] = 0;
  for (int m = r.first; m < r.first + r.count; ++m) {
    const int64_t first = m * (int64_t)w.scale_stride;
    float y = 0;
    if (w.type == FLOAT32) y = scale_row<FLOAT32>(w, first, groups, r.group_sums, scales);
    if (w.type == FLOAT16) y = scale_row<FLOAT16>(w, first, groups, r.group_sums, scales);
    if (w.type == BFLOAT16) y = scale_row<BFLOAT16>(w, first, groups, r.group_sums, scales);
    y += dot_row<BITS, GROUP>(w.codes + m * (int64_t)w.code_stride, r.inputs, r.prepared, scales);
    put_row(r.out, m, 1, &y);
  }
}

template <int BITS>
static void rows_bits(const Rows& r, float* scales) {
  if (r.weights.group_size == 32) rows_tile<BITS, 32>(r, scales);
  if (r.weights.group_size == 64) rows_tile<BITS, 64>(r, scales);
  if (r.weights.group_size == 128) rows_tile<BITS, 128>(r, scales);
}

static void rows(const Rows& r, float* scales) {
  switch (r.weights.bits) {
    case 2: return rows_bits<2>(r, scales);
    case 3: return rows_bits<3>(r, scales);
    case 4: return rows_bits<4>(r, scales);
    case 5: return rows_bits<5>(r, scales);
    case 6: return rows_bits<6>(r, scales);
    case 8: return rows_bits<8>(r, scales);
  }
}
