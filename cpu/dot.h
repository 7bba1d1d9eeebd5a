// The product of gemv.h with integer dot products (VNNI), 4 bits, 1 to 8 rows.
//
// u = x * scale of a row's channels is rounded to 24 bits, as many as a float32 has, of the largest by group of
// outputs and QUANT channels: bytes of codes times bytes of u add up exactly, four channels an instruction, and u
// is three bytes. Sums within QUANT channels are integers, so a row's bits do not depend on which channels its
// companions need.
#pragma once

constexpr int QUANT = 64;            // channels whose u share a scale by group and row
constexpr float MOST_U = (127 * 256 + 127) * 256 + 127;
constexpr int U_BYTES = 3;  // the highest first
constexpr int QUADS = QUANT / 4;

// Where unpack_quad leaves the codes of 128 outputs: vector v holds those of one group, even or odd ones.
template <int GROUP>
struct DotOrder {
  static constexpr int PASSES = 1, WIDTH = LANES, COLUMN = 8 * LANES;
  static constexpr int quarter(int v) { return v % 4 * 32 / GROUP; }  // the vector's group within the column
  static constexpr int index(int, int v, int lane) {
    const int part = v % 4, quad = lane / 4;  // a quad of 32-bit words: of which 32 outputs, and of which eight
    const int run = GROUP == 32 ? part : GROUP == 64 ? part / 2 * 2 + quad % 2 : quad;
    const int eight = GROUP == 32 ? quad : GROUP == 64 ? part % 2 * 2 + quad / 2 : part;
    return run * 32 + eight * 8 + lane % 4 * 2 + v / 4;
  }
  static constexpr int shift(int, int, int) { return 0; }
};

// Some channels of one tile: all of one QUANT.
template <int ROWS>
struct DotBlock {
  static constexpr int GROUPS = tile_of_rows(ROWS) / 32 + LANES;
  const uint8_t* codes[QUANT];
  int count, stride;                        // stride: values from one row's groups to the next's
  alignas(64) float unit[ROWS * GROUPS];    // what 1 of the rounded u stands for
  alignas(64) int32_t u[U_BYTES][QUADS * ROWS * GROUPS];  // a word: a byte each of four channels
  alignas(64) uint8_t bytes[QUADS][8][64];  // codes of a column, one a byte, four channels a word
};

// the larger of |a| and |b|
SPQT_INLINE vf largest(vf a, vf b) { return (vf)_mm512_range_ps((__m512)a, (__m512)b, 11); }
SPQT_INLINE vi rounded(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }
SPQT_INLINE vi dot(vi sum, vi codes, vi u) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)u);
}

// Bytes of u of four channels, channel 2 before channel 1. What is below a byte is signed, so 128 goes up.
template <class B>
SPQT_INLINE void put_bytes(const vi (&v)[4], B& block, int at) {
  auto pair = [](vi a, vi b) SPQT_LAMBDA { return _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)a, (__m512i)(b << 16)); };
  const __m512i half = _mm512_set1_epi16(128), lower = _mm512_set1_epi16(255);
  vi up[4];
  for (int c = 0; c < 4; ++c) up[c] = (v[c] + 128) >> 8;
  const __m512i even = pair(up[0], up[1]), odd = pair(up[2], up[3]);
  store(block.u[0] + at, _mm512_or_si512(_mm512_srli_epi16(_mm512_add_epi16(even, half), 8),
                                         _mm512_andnot_si512(lower, _mm512_add_epi16(odd, half))));
  store(block.u[1] + at, _mm512_or_si512(_mm512_and_si512(even, lower), _mm512_slli_epi16(odd, 8)));
  store(block.u[2] + at, _mm512_or_si512(_mm512_and_si512(pair(v[0], v[1]), lower),
                                         _mm512_slli_epi16(pair(v[2], v[3]), 8)));
}

// x * bias of all channels added to the sums; u in 24 bits by channel, row and group.
template <Type T, int ROWS>
static void round_block(const Tile& tile, const Active& active, int first, DotBlock<ROWS>& block, float* bias_sums) {
  const int stride = block.stride;
  const float* x = active.x + (int64_t)first * ROWS;
  for (int g = 0; g < tile.groups; g += LANES) {
    const int some = min_of(LANES, tile.groups - g);
    auto groups = [&](const void* of, int i) SPQT_LAMBDA {
      const int64_t at = active.channel[first + i] * (int64_t)tile.scale_stride + g;
      return some == LANES ? load_as_float<T>(of, at) : load_as_float<T>(of, at, some);
    };
    vf top[ROWS] = {}, sums[ROWS], inverse[ROWS];
    for (int r = 0; r < ROWS; ++r) sums[r] = load<vf>(bias_sums + r * active.row_stride + g);
    for (int i = 0; i < block.count; ++i) {
      const vf scales = groups(tile.scales, i), biases = groups(tile.biases, i);
      for (int r = 0; r < ROWS; ++r) {
        const vf one = splat(x[i * ROWS + r]);
        top[r] = largest(top[r], one * scales);
        sums[r] += one * biases;
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const vf unit = top[r] * (1 / MOST_U);
      store(block.unit + r * stride + g, unit);
      store(bias_sums + r * active.row_stride + g, sums[r]);
      // below the least 1 / unit overflows, and the product is nothing
      inverse[r] = (vf)((vi)(splat(1.0f) / unit) & (unit > splat(0x1p-120f)));
    }
    for (int q = 0; q * 4 < block.count; ++q) {
      vf scales[4] = {};
      for (int c = 0; c < min_of(4, block.count - q * 4); ++c) scales[c] = groups(tile.scales, q * 4 + c);
      for (int r = 0; r < ROWS; ++r) {
        vi v[4];
        for (int c = 0; c < 4; ++c)
          v[c] = rounded(splat(x[min_of(q * 4 + c, block.count - 1) * ROWS + r]) * scales[c] * inverse[r]);
        put_bytes(v, block, (q * ROWS + r) * stride + g);
      }
    }
  }
}

// 64 bytes of four channels -> eight vectors of codes in DotOrder, a word of each four codes of one output
template <int GROUP>
SPQT_INLINE void unpack_quad(const __m512i (&w)[4], uint8_t (&out)[8][64]) {
  // channels in the order of put_bytes
  const __m512i low = _mm512_unpacklo_epi8(w[0], w[2]), low2 = _mm512_unpacklo_epi8(w[1], w[3]);
  const __m512i high = _mm512_unpackhi_epi8(w[0], w[2]), high2 = _mm512_unpackhi_epi8(w[1], w[3]);
  __m512i all[4] = {_mm512_unpacklo_epi16(low, low2), _mm512_unpackhi_epi16(low, low2),
                    _mm512_unpacklo_epi16(high, high2), _mm512_unpackhi_epi16(high, high2)};
  if constexpr (GROUP < 128) {  // quads of a group together
    const __m512i a = _mm512_shuffle_i32x4(all[0], all[1], 0x44), b = _mm512_shuffle_i32x4(all[2], all[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(all[0], all[1], 0xee), d = _mm512_shuffle_i32x4(all[2], all[3], 0xee);
    all[0] = a, all[1] = b, all[2] = c, all[3] = d;
    if constexpr (GROUP == 32) {
      all[0] = _mm512_shuffle_i32x4(a, b, 0x88), all[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
      all[2] = _mm512_shuffle_i32x4(c, d, 0x88), all[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
  }
  const __m512i mask = _mm512_set1_epi8(15);
  for (int v = 0; v < 4; ++v) {
    _mm512_store_si512(out[v], _mm512_and_si512(all[v], mask));
    _mm512_store_si512(out[4 + v], _mm512_and_si512(_mm512_srli_epi16(all[v], 4), mask));
  }
}

// Some rows and vectors of a column, whose groups begin at `group`.
template <int GROUP, int ROWS, int SOME_ROWS, int SOME, int FIRST = 0>
SPQT_INLINE void dot_some(const DotBlock<ROWS>& block, int quads, int row, int group, float* sums, size_t stride) {
  constexpr auto quarter = DotOrder<GROUP>::quarter;
  vi sum[U_BYTES][SOME_ROWS][SOME] = {};
  for (int q = 0; q < quads; ++q) {
    const int64_t at = (int64_t)(q * ROWS + row) * block.stride + group;
    if constexpr (ROWS == 1) {
      vi u[U_BYTES][4];
      for (int b = 0; b < U_BYTES; ++b)
        for (int n = 0; n < 128 / GROUP; ++n) u[b][n] = vi{} + block.u[b][at + n];
      for (int v = 0; v < SOME; ++v) {
        const vi codes = load<vi>(block.bytes[q][FIRST + v]);
        for (int b = 0; b < U_BYTES; ++b) sum[b][0][v] = dot(sum[b][0][v], codes, u[b][quarter(FIRST + v)]);
      }
      continue;
    }
    vi codes[SOME];
    for (int v = 0; v < SOME; ++v) codes[v] = load<vi>(block.bytes[q][FIRST + v]);
    for (int r = 0; r < SOME_ROWS; ++r)
      for (int b = 0; b < U_BYTES; ++b) {
        vi u;
        for (int v = 0; v < SOME; ++v) {
          if (v == 0 || quarter(FIRST + v) != quarter(FIRST + v - 1)) {
            u = vi{} + block.u[b][at + r * block.stride + quarter(FIRST + v)];
            asm("" : "+v"(u));  // loaded once, not for each product
          }
          sum[b][r][v] = dot(sum[b][r][v], codes[v], u);
        }
      }
  }
  for (int r = 0; r < SOME_ROWS; ++r)
    for (int v = 0; v < SOME; ++v) {
      float* to = sums + (row + r) * stride + (FIRST + v) * LANES;
      const vf unit = splat(block.unit[(row + r) * block.stride + group + quarter(FIRST + v)]);
      const vf high = __builtin_convertvector(sum[0][r][v], vf), low = __builtin_convertvector((sum[1][r][v] << 8) + sum[2][r][v], vf);
      store(to, load<vf>(to) + unit * (high * 65536.0f + low));
    }
  if constexpr (FIRST + SOME < 8)
    dot_some<GROUP, ROWS, SOME_ROWS, SOME, FIRST + SOME>(block, quads, row, group, sums, stride);
}

template <int GROUP, int ROWS>
static void dot_block(const Tile& tile, DotBlock<ROWS>& block, float* sums, size_t row_stride,
                      const uint8_t* const* next, int next_count) {
  constexpr int SOME_ROWS = min_of(ROWS, 4), SOME = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;  // accumulators are registers
  const int bytes = tile.groups * GROUP / 2, columns = (bytes + 63) / 64, quads = (block.count + 3) / 4;
  int ahead = 0, line = 0;  // of the next channels' chunks, read from end to end
  for (int column = 0; column < columns; ++column, sums += DotOrder<GROUP>::COLUMN) {
    const int left = bytes - column * 64;
    const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
    for (int q = 0; q < quads; ++q) {
      for (int i = 0; i < 4 && ahead < next_count; ++i) {
        __builtin_prefetch(next[ahead] + line * 64, 0, 2);
        if (++line == columns) line = 0, ++ahead;
      }
      __m512i w[4];
      for (int c = 0; c < 4; ++c) w[c] = _mm512_maskz_loadu_epi8(there, block.codes[q * 4 + c] + column * 64);
      unpack_quad<GROUP>(w, block.bytes[q]);
    }
    for (int r = 0; r < ROWS; r += SOME_ROWS)
      dot_some<GROUP, ROWS, SOME_ROWS, SOME>(block, quads, r, column * (DotOrder<GROUP>::COLUMN / GROUP), sums,
                                             row_stride);
  }
}

// The end of the channels from `first` on that lie in one QUANT.
static int end_of_quant(const Active& active, int first) {
  const int border = (active.channel[first] / QUANT + 1) * QUANT;
  int end = first + 1;
  while (end < active.count && active.channel[end] < border) ++end;
  return end;
}

template <int ROWS>
static void dot_tile(const Tile& tile, const Active& active, float* partial) {
  const size_t size = partial_size(tile.groups, tile.group_size), stride = active.row_stride;
  for (int r = 0; r < ROWS; ++r)
    for (size_t i = 0; i < size; i += LANES) store(partial + r * stride + i, vf{});
  float* bias_sums = partial + partial_sums(tile.groups, tile.group_size);
  DotBlock<ROWS> block;
  block.stride = (tile.groups + LANES - 1) / LANES * LANES;
  for (int first = 0, end; first < active.count; first = end) {
    end = end_of_quant(active, first);
    block.count = end - first;
    for (int i = 0; i < (block.count + 3) / 4 * 4; ++i)
      block.codes[i] = tile.codes + active.channel[min_of(first + i, end - 1)] * (int64_t)tile.code_stride;
    const uint8_t* next[QUANT];
    int next_count = 0;
    for (int i = end; i < active.count && next_count < QUANT; ++i)
      next[next_count++] = tile.codes + active.channel[i] * (int64_t)tile.code_stride;
    if (tile.type == FLOAT32) round_block<FLOAT32>(tile, active, first, block, bias_sums);
    if (tile.type == FLOAT16) round_block<FLOAT16>(tile, active, first, block, bias_sums);
    if (tile.type == BFLOAT16) round_block<BFLOAT16>(tile, active, first, block, bias_sums);
    if (tile.group_size == 32) dot_block<32>(tile, block, partial, stride, next, next_count);
    if (tile.group_size == 64) dot_block<64>(tile, block, partial, stride, next, next_count);
    if (tile.group_size == 128) dot_block<128>(tile, block, partial, stride, next, next_count);
  }
}
