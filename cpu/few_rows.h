// The product of gemv.h for 2, 4 or 8 rows: codes are unpacked once for all of them.
//
// The same operations in the same order for each row, so its bits do not depend on its companions: a channel
// that a row skips adds u = 0. u of a column is laid out once for all channels of a block; each unpacked
// vector of codes then serves every row.
#pragma once

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ACCUMULATORS = 16;  // of 32 registers
#else
constexpr int ACCUMULATORS = 8;  // of 16
#endif
constexpr int MOST_CHANNELS = 32;  // of a block: sums go to L2 and back once for each
constexpr int LAID_BYTES = 16384;  // of a block's u in a column, which stays in L1

// Else compilers load an operand again for each multiplication, and loads are what limits.
SPQT_INLINE void in_register(vf& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

template <int BITS, int ROWS>
struct FewBlock {
  static constexpr int KINDS = VECTORS / Codec<BITS>::SHARED;  // of vectors of u in a column
  static constexpr int MOST = min_of(MOST_CHANNELS, LAID_BYTES / (ROWS * KINDS * LANES * 4));
  int count;  // channels
  const uint8_t* codes[MOST];
  const uint8_t* next[MOST];  // as Block's
  alignas(64) float u[MOST][ROWS][tile_of_rows(ROWS) / 32 + PADDING];
};

// x * scale of each row by group, and x * bias added to the rows' sums by group, `stride` apart
template <Type T, int ROWS, class U>
SPQT_INLINE void scale_channel_rows(const Tile& tile, int64_t first, const float* x, U& u, float* bias_sums,
                                    size_t stride) {
  int g = 0;
  auto scale = [&](vf scales, vf biases) SPQT_LAMBDA {
    for (int r = 0; r < ROWS; ++r) {
      float* sums = bias_sums + r * stride + g;
      store(u[r] + g, splat(x[r]) * scales);
      store(sums, load<vf>(sums) + splat(x[r]) * biases);
    }
  };
  for (; g + LANES <= tile.groups; g += LANES)
    scale(load_as_float<T>(tile.scales, first + g), load_as_float<T>(tile.biases, first + g));
#if SPQT_MASKED_LOADS
  if (int rest = tile.groups - g)
    scale(load_as_float<T>(tile.scales, first + g, rest), load_as_float<T>(tile.biases, first + g, rest));
#else
  for (; g < tile.groups; ++g)
    for (int r = 0; r < ROWS; ++r) {
      u[r][g] = x[r] * scalar<T>(tile.scales, first + g);
      bias_sums[r * stride + g] += x[r] * scalar<T>(tile.biases, first + g);
    }
#endif
}

template <Type T, int BITS, int ROWS>
static void start_few_of(const Tile& tile, const Active& active, int first, FewBlock<BITS, ROWS>& block,
                         float* bias_sums) {
  constexpr int BYTES = T == FLOAT32 ? 4 : 2;
  const int count = block.count = min_of(block.MOST, active.count - first);
  for (int i = 0; i < count; ++i) {
    const int64_t channel = active.channel[first + i];
    block.codes[i] = tile.codes + channel * tile.code_stride;
    scale_channel_rows<T, ROWS>(tile, channel * tile.scale_stride, active.x + (int64_t)(first + i) * ROWS, block.u[i],
                                bias_sums, active.row_stride);
    const int64_t next = active.channel[min_of(first + block.MOST + i, active.count - 1)];
    block.next[i] = tile.codes + next * tile.code_stride;
    const int64_t offset = next * tile.scale_stride * BYTES;
    for (int line = 0; line < tile.groups * BYTES; line += 64) {
      prefetch((const uint8_t*)tile.scales + offset + line);
      prefetch((const uint8_t*)tile.biases + offset + line);
    }
  }
}

template <int BITS, int ROWS>
static void start_few(const Tile& tile, const Active& active, int first, FewBlock<BITS, ROWS>& block,
                      float* bias_sums) {
  if (tile.type == FLOAT32) start_few_of<FLOAT32>(tile, active, first, block, bias_sums);
  if (tile.type == FLOAT16) start_few_of<FLOAT16>(tile, active, first, block, bias_sums);
  if (tile.type == BFLOAT16) start_few_of<BFLOAT16>(tile, active, first, block, bias_sums);
}

// u of a column for every channel and row, as vectors: KINDS of them, of SHARED vectors of codes each
template <int BITS, int GROUP, int ROWS>
static void lay_out_of(const FewBlock<BITS, ROWS>& block, int column, float* laid) {
  using C = Codec<BITS>;
  for (int i = 0; i < block.count; ++i)
    for (int r = 0; r < ROWS; ++r) {
      vf u[VECTORS];
      C::template expand<GROUP>(block.u[i][r], column, u);
      for (int v = 0; v < VECTORS; v += C::SHARED, laid += LANES) store(laid, u[v]);
    }
}

template <int BITS, int ROWS>
SPQT_INLINE void lay_out(const FewBlock<BITS, ROWS>& block, int column, int group_size, float* laid) {
  if (group_size == 32) lay_out_of<BITS, 32>(block, column, laid);
  if (group_size == 64) lay_out_of<BITS, 64>(block, column, laid);
  if (group_size == 128) lay_out_of<BITS, 128>(block, column, laid);
}

template <int BITS, int ROWS, int PASS, int FIRST = 0>
SPQT_INLINE void add_rows(int count, const uint8_t* const* codes, size_t offset, const float* laid, float* sums,
                          size_t stride) {
  using C = Codec<BITS>;
  constexpr int SOME = min_of(VECTORS, ACCUMULATORS / ROWS), KINDS = FewBlock<BITS, ROWS>::KINDS;
  vf sum[ROWS][SOME];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < SOME; ++v) sum[r][v] = load<vf>(sums + r * stride + (FIRST + v) * LANES);
  for (int i = 0; i < count; ++i) {
    const float* u = laid + i * ROWS * KINDS * LANES;
    vf unpacked[SOME];
    auto keep = [&](int v, vf code) SPQT_LAMBDA { unpacked[v - FIRST] = code; };
    C::template unpack<PASS, FIRST, SOME>(codes[i] + offset, keep);
    for (int r = 0; r < ROWS; ++r) {
      vf one;
      for (int v = 0; v < SOME; ++v) {
        if (v == 0 || (FIRST + v) % C::SHARED == 0) {
          one = load<vf>(u + (r * KINDS + (FIRST + v) / C::SHARED) * LANES);
          in_register(one);
        }
        sum[r][v] += one * unpacked[v];
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < SOME; ++v) store(sums + r * stride + (FIRST + v) * LANES, sum[r][v]);
  if constexpr (FIRST + SOME < VECTORS)
    add_rows<BITS, ROWS, PASS, FIRST + SOME>(count, codes, offset, laid, sums, stride);
}

template <int BITS, int ROWS>
static void add_few(const FewBlock<BITS, ROWS>& block, const Tile& tile, float* sums, size_t stride) {
  using C = Codec<BITS>;
  constexpr int SUMS = VECTORS * LANES;  // of one pass
  const int bytes = tile.groups * tile.group_size * BITS / 8;
  alignas(64) float laid[block.MOST * ROWS * block.KINDS * LANES];
  alignas(64) uint8_t last[block.MOST][C::COLUMN_BYTES];  // a column that chunks end in, filled up with zeros
  const uint8_t* of_last[block.MOST];
  for (int begin = 0, column = 0; begin < bytes; begin += C::COLUMN_BYTES, ++column, sums += C::PASSES * SUMS) {
    for (int line = (begin + 63) / 64 * 64; line < min_of(begin + C::COLUMN_BYTES, bytes); line += 64)
      for (int i = 0; i < block.count; ++i) prefetch(block.next[i] + line);
    lay_out<BITS>(block, column, tile.group_size, laid);
    const bool whole = begin + C::COLUMN_BYTES <= bytes;
    for (int i = 0; i < block.count && !whole; ++i) {
      __builtin_memset(last[i], 0, C::COLUMN_BYTES);
      for (int at = begin; at < bytes; at += 4) __builtin_memcpy(last[i] + at - begin, block.codes[i] + at, 4);
      of_last[i] = last[i];
    }
    const uint8_t* const* codes = whole ? block.codes : of_last;
    const size_t offset = whole ? begin : 0;
    add_rows<BITS, ROWS, 0>(block.count, codes, offset, laid, sums, stride);
    if constexpr (C::PASSES == 2) add_rows<BITS, ROWS, 1>(block.count, codes, offset, laid, sums + SUMS, stride);
  }
}

template <int BITS, int ROWS>
static void few_rows_tile(const Tile& tile, const Active& active, float* partial) {
  const size_t size = partial_size(tile.groups, tile.group_size), stride = active.row_stride;
  for (int r = 0; r < ROWS; ++r)
    for (size_t i = 0; i < size; i += LANES) store(partial + r * stride + i, vf{});
  float* bias_sums = partial + partial_sums(tile.groups, tile.group_size);
  FewBlock<BITS, ROWS> block;
  for (int first = 0; first < active.count; first += block.MOST) {
    start_few(tile, active, first, block, bias_sums);
    add_few<BITS, ROWS>(block, tile, partial, stride);
  }
}
