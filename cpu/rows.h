// The dense GEMV of MLX's own layout, groups along the inputs: heads, tied embeddings, skipped layers.
//
// y[m] = sum over g of scale[m, g] * (codes . x) + bias[m, g] * (sum of x in g). x is laid out once per call
// in the order in which codes unpack, divided by the lanes' shifts; each row is then one stream of codes, which
// serves up to four tokens.
#pragma once

static void sum_groups(const Input& in, int group_size, float* group_sums) {
  for (int g = 0; g < in.inputs / group_size; ++g) {
    group_sums[g] = 0;
    for (int k = g * group_size; k < (g + 1) * group_size; ++k)
      group_sums[g] += any_element(in.x, in.type, k * in.stride);
  }
}

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
  sum_groups(in, group_size, group_sums);
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

// Codes are unpacked once for all tokens, whose x lie `stride` apart.
template <int BITS, int GROUP, int PASS, bool WHOLE, int TOKENS>
SPQT_INLINE void dot_column(const uint8_t* codes, int part, const float* x, size_t stride, const float* scales,
                            int column, vf* totals) {
  using C = Codec<BITS>;
  vf unpacked[VECTORS], scale[VECTORS];
  C::template expand<GROUP>(scales, column, scale);
  auto keep = [&](int v, vf code) SPQT_LAMBDA { unpacked[v] = code; };
  if constexpr (WHOLE)
    C::template unpack<PASS>(codes, keep);
  else
    C::template unpack_part<PASS>(codes, part, keep);
  for (int t = 0; t < TOKENS; ++t) {
    vf sums[VECTORS] = {};  // two sums in turn for lanes of the same groups: shorter chains
    for (int v = 0; v < VECTORS; ++v)
      sums[v / C::SHARED * C::SHARED + v % 2] += unpacked[v] * load<vf>(x + t * stride + v * LANES);
    vf total = (sums[0] + sums[1]) * scale[0];
    for (int v = C::SHARED; v < VECTORS; v += C::SHARED) total += (sums[v] + sums[v + 1]) * scale[v];
    totals[t] += total;
  }
}

// bytes of codes, of the same and the following rows; hardware runs less far ahead
constexpr int ROWS_AHEAD = 2048;

template <int BITS, int GROUP, int TOKENS>
SPQT_INLINE void dot_row(const uint8_t* codes, int inputs, const float* x, size_t stride, const float* scales,
                         vf* totals) {
  using C = Codec<BITS>;
  constexpr int SUMS = VECTORS * LANES;
  const int bytes = inputs / 8 * BITS, columns = bytes / C::COLUMN_BYTES, part = bytes % C::COLUMN_BYTES;
  int c = 0;
  for (; c < columns; ++c, codes += C::COLUMN_BYTES, x += C::PASSES * SUMS) {
    for (int line = 0; line < C::COLUMN_BYTES; line += 64) __builtin_prefetch(codes + ROWS_AHEAD + line);
    dot_column<BITS, GROUP, 0, true, TOKENS>(codes, 0, x, stride, scales, c, totals);
    if constexpr (C::PASSES == 2)
      dot_column<BITS, GROUP, 1, true, TOKENS>(codes, 0, x + SUMS, stride, scales, c, totals);
  }
  if (part) {
    dot_column<BITS, GROUP, 0, false, TOKENS>(codes, part, x, stride, scales, c, totals);
    if constexpr (C::PASSES == 2)
      dot_column<BITS, GROUP, 1, false, TOKENS>(codes, part, x + SUMS, stride, scales, c, totals);
  }
}

// A row's scales as float, and in `totals` and `rest` what its biases add for each token. last_sums: of the last LANES
// groups, 0 for those that whole vectors had before.
template <Type T, int TOKENS>
SPQT_INLINE void start_row(const Rows& r, int64_t first, int groups, const vf* last_sums, float* scales, vf* totals,
                           float* rest) {
  const Tile& w = r.weights;
  int g = 0;
  for (int t = 0; t < TOKENS; ++t) totals[t] = vf{}, rest[t] = 0;
  for (; g + LANES <= groups; g += LANES) {
    store(scales + g, load_as_float<T>(w.scales, first + g));
    const vf biases = load_as_float<T>(w.biases, first + g);
    for (int t = 0; t < TOKENS; ++t) totals[t] += biases * load<vf>(r.group_sums + t * r.stride + g);
  }
  if (g && g < groups) {
    const int last = groups - LANES;
    store(scales + last, load_as_float<T>(w.scales, first + last));
    const vf biases = load_as_float<T>(w.biases, first + last);
    for (int t = 0; t < TOKENS; ++t) totals[t] += biases * last_sums[t];
    return;
  }
  for (; g < groups; ++g) {
    scales[g] = scalar<T>(w.scales, first + g);
    for (int t = 0; t < TOKENS; ++t) rest[t] += scalar<T>(w.biases, first + g) * r.group_sums[t * r.stride + g];
  }
}

template <int BITS, int GROUP, int TOKENS>
static void rows_tile(const Rows& rows, float* scales) {
  const Rows r = rows;
  const Tile& w = r.weights;
  const int groups = r.inputs / GROUP;
  // the last column multiplies scales of groups that are not there by codes of zero: NaN would spread
  for (int g = groups; g < groups + PADDING; ++g) scales[g] = 0;
  vf last_sums[TOKENS] = {};
  for (int t = 0; t < TOKENS && groups >= LANES; ++t)
    for (int g = groups / LANES * LANES; g < groups; ++g)
      last_sums[t][g - groups + LANES] = r.group_sums[t * r.stride + g];
  const bool plain = r.out.type == FLOAT32 && !r.out.bias;
  for (int m = r.first; m < r.first + r.count; ++m) {
    const int64_t first = m * (int64_t)w.scale_stride;
    vf totals[TOKENS];
    float y[TOKENS];
    if (w.type == FLOAT32) start_row<FLOAT32, TOKENS>(r, first, groups, last_sums, scales, totals, y);
    if (w.type == FLOAT16) start_row<FLOAT16, TOKENS>(r, first, groups, last_sums, scales, totals, y);
    if (w.type == BFLOAT16) start_row<BFLOAT16, TOKENS>(r, first, groups, last_sums, scales, totals, y);
    dot_row<BITS, GROUP, TOKENS>(w.codes + m * (int64_t)w.code_stride, r.inputs, r.prepared, r.stride, scales, totals);
    for (int t = 0; t < TOKENS; ++t) {
      y[t] += add_lanes(totals[t]);
      if (plain) {
        ((float*)r.out.y)[t * r.y_stride + m] = y[t];
        continue;
      }
      Output out = r.out;
      out.y = (uint8_t*)r.out.y + t * r.y_stride * (r.out.type == FLOAT32 ? 4 : 2);
      put_row(out, m, 1, y + t);
    }
  }
}

template <int BITS, int GROUP>
static void rows_group(const Rows& r, float* scales) {
  if (r.tokens == 1) rows_tile<BITS, GROUP, 1>(r, scales);
  if (r.tokens == 2) rows_tile<BITS, GROUP, 2>(r, scales);
  if (r.tokens == 4) rows_tile<BITS, GROUP, 4>(r, scales);
}

template <int BITS>
static void rows_bits(const Rows& r, float* scales) {
  if (r.weights.group_size == 32) rows_group<BITS, 32>(r, scales);
  if (r.weights.group_size == 64) rows_group<BITS, 64>(r, scales);
  if (r.weights.group_size == 128) rows_group<BITS, 128>(r, scales);
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
