// The sparse GEMV of one tile: y[j] = sum over active k of x[k] * (code[k, j] * scale[k, g] + bias[k, g]).
//
// 1. A block of 8 active channels: u = x * scale by group, and x * bias into a sum by group.
// 2. Column by column: eight accumulators, from memory and back, take u * code of the 8 channels.
// 3. While a column is multiplied, the same column of the next block is prefetched: hardware prefetchers
//    can't guess which channels come next.
// Chunks are read side by side from end to end, so blocks are small and tiles wide: 16 channels by 2,048
// outputs took 1.5 times as long. The order of sums depends on the list of channels alone, never on threads.
#pragma once

#include "subnormal.h"

struct Block {
  const uint8_t* codes[BLOCK];
  const uint8_t* next[BLOCK];  // chunks of the following block; the same again where there is none
  alignas(64) float u[BLOCK][TILE / 32 + PADDING];
  int count;
};

// u: x * up * scale; odd: where u is raised, collects which of them are out_of_range
template <Type T, bool RAISED>
SPQT_INLINE void scale_channel(const Tile& tile, int64_t first, float x, float up, float* u, float* bias_sums,
                               vi& odd) {
  const vf wide = splat(x), raised = splat(x * up);
  auto put = [&](int g, vf value) SPQT_LAMBDA {
    store(u + g, value);
    if constexpr (RAISED && T != FLOAT16) odd |= out_of_range(value);  // no float16 can be
  };
  int g = 0;
  for (; g + LANES <= tile.groups; g += LANES) {
    put(g, raised * load_as_float<T>(tile.scales, first + g));
    store(bias_sums + g, load<vf>(bias_sums + g) + wide * load_as_float<T>(tile.biases, first + g));
  }
#if SPQT_MASKED_LOADS
  if (int rest = tile.groups - g) {
    put(g, raised * load_as_float<T>(tile.scales, first + g, rest));
    store(bias_sums + g, load<vf>(bias_sums + g) + wide * load_as_float<T>(tile.biases, first + g, rest));
  }
#else
  for (; g < tile.groups; ++g) {
    u[g] = x * up * scalar<T>(tile.scales, first + g);
    if constexpr (RAISED && T != FLOAT16) odd[0] |= out_of_range(u[g]);
    bias_sums[g] += x * scalar<T>(tile.biases, first + g);
  }
#endif
}

template <Type T, bool RAISED>
static void start_block_of(const Tile& tile, const Active& active, float up, int first, Block& block, float* bias_sums,
                           vi& odd) {
  constexpr int BYTES = T == FLOAT32 ? 4 : 2;
  block.count = min_of(BLOCK, active.count - first);
  for (int i = 0; i < block.count; ++i) {
    int64_t channel = active.channel[first + i];
    block.codes[i] = tile.codes + channel * tile.code_stride;
    scale_channel<T, RAISED>(tile, channel * tile.scale_stride, active.x[first + i], up, block.u[i], bias_sums, odd);
    if (first + BLOCK + i >= active.count) {
      block.next[i] = block.codes[i];
      continue;
    }
    const int64_t next = active.channel[first + BLOCK + i];
    block.next[i] = tile.codes + next * tile.code_stride;
    int64_t offset = next * tile.scale_stride * BYTES;
    for (int line = 0; line < tile.groups * BYTES; line += 64) {
      prefetch((const uint8_t*)tile.scales + offset + line);
      prefetch((const uint8_t*)tile.biases + offset + line);
    }
  }
}

// The same where all groups fit into a few vectors, in a third of the instructions: nothing is read again that a store
// might have changed, and sums stay in registers. Without masked loads the last vector overlaps the one before: both
// have the same numbers there. Scales that fill less than half a line are fetched by the hardware, as the next
// channel's lie beside them.
template <Type T, bool RAISED, int VECTORS_OF_GROUPS>
static void start_narrow_block(const Tile tile, const Active active, float up, int first, Block& block, float* bias_sums,
                               vi& odd) {
  constexpr int BYTES = T == FLOAT32 ? 4 : 2, LAST = VECTORS_OF_GROUPS - 1;
  const int count = block.count = min_of(BLOCK, active.count - first);
#if SPQT_MASKED_LOADS
  const int rest = tile.groups - LAST * LANES;
  auto begin = [](int v) SPQT_LAMBDA { return v * LANES; };
  auto some = [&](const void* p, int64_t at, int v) SPQT_LAMBDA {
    return v < LAST ? load_as_float<T>(p, at + v * LANES) : load_as_float<T>(p, at + v * LANES, rest);
  };
#else
  const int last = tile.groups - LANES;
  auto begin = [&](int v) SPQT_LAMBDA { return v < LAST ? v * LANES : last; };
  auto some = [&](const void* p, int64_t at, int v) SPQT_LAMBDA { return load_as_float<T>(p, at + begin(v)); };
#endif
  vf sums[VECTORS_OF_GROUPS];
  for (int v = 0; v <= LAST; ++v) sums[v] = load<vf>(bias_sums + begin(v));
  for (int i = 0; i < count; ++i) {
    const int64_t channel = active.channel[first + i], next = active.channel[min_of(first + BLOCK + i, active.count - 1)];
    const int64_t at = channel * (int64_t)tile.scale_stride;
    const float x = active.x[first + i];
    for (int v = 0; v <= LAST; ++v) {
      const vf scales = some(tile.scales, at, v), biases = some(tile.biases, at, v);
      const vf value = splat(x * up) * scales;
      store(block.u[i] + begin(v), value);
      if constexpr (RAISED && T != FLOAT16) odd |= out_of_range(value);
      sums[v] += splat(x) * biases;
    }
    if constexpr (LAST || BYTES == 4) {
      const int64_t offset = next * (int64_t)tile.scale_stride * BYTES;
      prefetch((const uint8_t*)tile.scales + offset);
      prefetch((const uint8_t*)tile.biases + offset);
    }
    block.codes[i] = tile.codes + channel * tile.code_stride;
    block.next[i] = tile.codes + next * tile.code_stride;
  }
  for (int v = 0; v <= LAST; ++v) store(bias_sums + begin(v), sums[v]);
}

template <bool RAISED>
static void start_block(const Tile& tile, const Active& active, float up, int first, Block& block, float* bias_sums,
                        vi& odd) {
  auto start = [&]<Type T>() {
    auto narrow = [&]<int MOST>() {
      start_narrow_block<T, RAISED, MOST>(tile, active, up, first, block, bias_sums, odd);
    };
    if (SPQT_MASKED_LOADS || tile.groups >= LANES) {
      if (tile.groups <= LANES) return narrow.template operator()<1>();
      if (tile.groups <= 2 * LANES) return narrow.template operator()<2>();
      if (!SPQT_MASKED_LOADS && tile.groups <= 3 * LANES) return narrow.template operator()<3>();
    }
    start_block_of<T, RAISED>(tile, active, up, first, block, bias_sums, odd);
  };
  if (tile.type == FLOAT32) start.template operator()<FLOAT32>();
  if (tile.type == FLOAT16) start.template operator()<FLOAT16>();
  if (tile.type == BFLOAT16) start.template operator()<BFLOAT16>();
}

// COUNT: channels of a full block, else 0; part: bytes of an incomplete last column, else 0
template <int BITS, int GROUP, class As, int PASS, int COUNT, bool WHOLE>
SPQT_INLINE void add_column(const Block& block, int column, int part, float* sums) {
  using C = Codec<BITS>;
  vf sum[VECTORS], u[VECTORS];
  for (int v = 0; v < VECTORS; ++v) sum[v] = load<vf>(sums + v * LANES);
  const size_t offset = (size_t)column * C::COLUMN_BYTES;
  for (int i = 0; i < (COUNT ? COUNT : block.count); ++i) {
    C::template expand<GROUP>(block.u[i], column, u);
    auto add = [&](int v, vf code) SPQT_LAMBDA { sum[v] = multiply_add(u[v], code, sum[v]); };
    if constexpr (WHOLE)
      C::template unpack<PASS, 0, VECTORS, As>(block.codes[i] + offset, add);
    else
      C::template unpack_part<PASS, 0, VECTORS, As>(block.codes[i] + offset, part, add);
  }
  for (int v = 0; v < VECTORS; ++v) store(sums + v * LANES, sum[v]);
}

// The group that is left of a column of two.
template <class As, int COUNT>
SPQT_INLINE void add_half_column(const Block& block, int column, float* sums) {
#if SPQT_HALVES
  vf sum[4];
  for (int v = 0; v < 4; ++v) sum[v] = Halves::sum(sums, v);
  for (int i = 0; i < (COUNT ? COUNT : block.count); ++i) {
    const vf u = splat(block.u[i][column * 2]);
    auto add = [&](int v, vf code) SPQT_LAMBDA { sum[v] = multiply_add(u, code, sum[v]); };
    Halves::unpack<0, 4, As>(block.codes[i] + (size_t)column * Codec<4>::COLUMN_BYTES, add);
  }
  for (int v = 0; v < 4; ++v) Halves::put(sums, v, sum[v]);
#endif
}

// the lines of the next chunks that begin in a column
template <int COUNT>
SPQT_INLINE void prefetch_column(const Block& block, size_t offset, size_t bytes) {
  for (size_t line = (offset + 63) / 64 * 64; line < offset + bytes; line += 64)
    for (int i = 0; i < (COUNT ? COUNT : block.count); ++i) prefetch(block.next[i] + line);
}

template <int BITS, int GROUP, class As, int COUNT>
static void add_block(const Block& block, int bytes, float* sums) {
  using C = Codec<BITS>;
  constexpr int SUMS = VECTORS * LANES;  // of one pass
  const int columns = bytes / C::COLUMN_BYTES, part = bytes % C::COLUMN_BYTES;
  for (int column = 0; column < columns; ++column, sums += C::PASSES * SUMS) {
    prefetch_column<COUNT>(block, (size_t)column * C::COLUMN_BYTES, C::COLUMN_BYTES);
    add_column<BITS, GROUP, As, 0, COUNT, true>(block, column, 0, sums);
    if constexpr (C::PASSES == 2) add_column<BITS, GROUP, As, 1, COUNT, true>(block, column, 0, sums + SUMS);
  }
  if (part) {
    prefetch_column<COUNT>(block, (size_t)columns * C::COLUMN_BYTES, part);
    if constexpr (HAS_HALVES<BITS, GROUP>) return add_half_column<As, COUNT>(block, columns, sums);
    add_column<BITS, GROUP, As, 0, COUNT, false>(block, columns, part, sums);
    if constexpr (C::PASSES == 2) add_column<BITS, GROUP, As, 1, COUNT, false>(block, columns, part, sums + SUMS);
  }
}

// Whether every u was in range; always, where codes are converted.
template <int BITS, int GROUP, class As>
static bool gemv_tile(const Tile& tile, const Active& active, Powers powers, float* partial) {
  constexpr bool RAISED = std::is_same_v<As, Subnormal>;
  const int bytes = tile.groups * GROUP * BITS / 8;
  const size_t size = partial_size(tile.groups, GROUP), sums = partial_sums(tile.groups, GROUP);
  for (size_t i = 0; i < size; i += LANES) store(partial + i, vf{});
  float* bias_sums = partial + sums;
  Block blocks[2];  // one is multiplied while the next one's u is on its way to memory and back
  vi odd = {};
  auto start = [&](int first) SPQT_LAMBDA {
    start_block<RAISED>(tile, active, RAISED ? powers.up : 1, first, blocks[first / BLOCK % 2], bias_sums, odd);
  };
  if (active.count) start(0);
  for (int first = 0; first < active.count; first += BLOCK) {
    if (first + BLOCK < active.count) start(first + BLOCK);
    const Block& block = blocks[first / BLOCK % 2];
    if (block.count == BLOCK)
      add_block<BITS, GROUP, As, BLOCK>(block, bytes, partial);
    else
      add_block<BITS, GROUP, As, 0>(block, bytes, partial);
  }
  if constexpr (RAISED) {
    for (int l = 0; l < LANES; ++l)
      if (odd[l]) return false;
    for (size_t i = 0; i < sums; i += LANES) store(partial + i, load<vf>(partial + i) * splat(powers.down));
  }
  return true;
}

template <int BITS, int GROUP>
static void gemv_group(const Tile& tile, const Active& active, float* partial) {
  Powers powers;
  if (takes_subnormals() && powers_of(active, powers) &&
      gemv_tile<BITS, GROUP, Subnormal>(tile, active, powers, partial))
    return count_subnormal();
  gemv_tile<BITS, GROUP, Converted>(tile, active, {}, partial);
}

#include "few_rows.h"

template <int BITS>
static void gemv_bits(const Tile& tile, const Active& active, float* partial) {
  if (active.rows == 2) return few_rows_tile<BITS, 2>(tile, active, partial);
  if (active.rows == 4) return few_rows_tile<BITS, 4>(tile, active, partial);
  if (active.rows == 8) return few_rows_tile<BITS, 8>(tile, active, partial);
  if (tile.group_size == 32) gemv_group<BITS, 32>(tile, active, partial);
  if (tile.group_size == 64) gemv_group<BITS, 64>(tile, active, partial);
  if (tile.group_size == 128) gemv_group<BITS, 128>(tile, active, partial);
}

static void gemv(const Tile& tile, const Active& active, float* partial) {
  switch (tile.bits) {
    case 2: return gemv_bits<2>(tile, active, partial);
    case 3: return gemv_bits<3>(tile, active, partial);
    case 4: return gemv_bits<4>(tile, active, partial);
    case 5: return gemv_bits<5>(tile, active, partial);
    case 6: return gemv_bits<6>(tile, active, partial);
    case 8: return gemv_bits<8>(tile, active, partial);
  }
}

// y of one column from its sums, in the order of the outputs; runs of 32 outputs are within one group
template <class Order>
SPQT_INLINE void finish_column(const float* sums, const float* run_bias, float* y) {
  for (int pass = 0; pass < Order::PASSES; ++pass)
    for (int l = 0; l < Order::WIDTH; ++l)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const int i = Order::index(pass, v, l);
        const float factor = 1.0f / (1 << Order::shift(pass, v, l));
        y[i] = sums[(pass * VECTORS + v) * Order::WIDTH + l] * factor + run_bias[i / 32];
      }
}

template <Type T>
static void put_outputs(const Output& out, int first, int count, const float* y) {
  for (int i = 0; i < count && !out.bias; ++i) put<T>(out.y, first + i, y[i]);
  for (int i = 0; i < count && out.bias; ++i)
    put<T>(out.y, first + i, y[i] + any_element(out.bias, out.bias_type, first + i));
}

static void put_row(const Output& out, int first, int count, const float* y) {
  if (out.type == FLOAT32) put_outputs<FLOAT32>(out, first, count, y);
  if (out.type == FLOAT16) put_outputs<FLOAT16>(out, first, count, y);
  if (out.type == BFLOAT16) put_outputs<BFLOAT16>(out, first, count, y);
}

template <class Order>
static void finish_order(const Tile& tile, float* partials, int stripes, const Output& out) {
  const size_t size = partial_size(tile.groups, tile.group_size);
  for (int s = 1; s < stripes; ++s)
    for (size_t i = 0; i < size; i += LANES)
      store(partials + i, load<vf>(partials + i) + load<vf>(partials + s * size + i));
  const float* bias_sums = partials + partial_sums(tile.groups, tile.group_size);
  const bool plain = out.type == FLOAT32 && !out.bias;
  for (int first = 0; first < out.outputs; first += Order::COLUMN) {
    float y[Order::COLUMN], run_bias[Order::COLUMN / 32];
    for (int run = 0; run < Order::COLUMN / 32; ++run)
      run_bias[run] = bias_sums[min_of((first + run * 32) / tile.group_size, tile.groups - 1)];
    if (plain && first + Order::COLUMN <= out.outputs) {
      finish_column<Order>(partials + first, run_bias, (float*)out.y + first);
      continue;
    }
    finish_column<Order>(partials + first, run_bias, y);
    put_row(out, first, min_of(Order::COLUMN, out.outputs - first), y);
  }
}

static void finish(const Tile& tile, float* partials, int stripes, const Output& out) {
  switch (tile.bits) {
    case 2: return finish_order<Codec<2>>(tile, partials, stripes, out);
    case 3: return finish_order<Codec<3>>(tile, partials, stripes, out);
    case 4: return finish_order<Codec<4>>(tile, partials, stripes, out);
    case 5: return finish_order<Codec<5>>(tile, partials, stripes, out);
    case 6: return finish_order<Codec<6>>(tile, partials, stripes, out);
    case 8: return finish_order<Codec<8>>(tile, partials, stripes, out);
  }
}

template <Type T>
static int collect_type(const Input& in, int32_t* channel, float* x) {
  const float always = 0;  // |x| < 0 is never true: every channel is active
  const float* threshold = in.threshold ? in.threshold : &always;
  const int64_t step = in.threshold ? in.threshold_stride : 0;
  int count = 0;
  for (int k = 0; k < in.inputs; ++k) {
    float value = element<T>(in.x, k * in.stride);
    channel[count] = k;
    x[count] = value;
    count += !(__builtin_fabsf(value) < threshold[k * step]);
  }
  return count;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
SPQT_INLINE int compress(vi skip, vi numbers, vf values, int32_t* channel, float* x) {
  const __mmask16 kept = (__mmask16)~_mm512_movepi32_mask((__m512i)skip);
  store(channel, (vi)_mm512_maskz_compress_epi32(kept, (__m512i)numbers));
  store(x, (vf)_mm512_maskz_compress_ps(kept, (__m512)values));
  return __builtin_popcount(kept);
}
#define SPQT_COMPRESS 1
#elif defined(__AVX2__)
// lanes of each set of kept lanes, first ones first
struct KeptLanes {
  uint8_t lane[256][8];
  constexpr KeptLanes() : lane() {
    for (int kept = 0; kept < 256; ++kept)
      for (int l = 0, n = 0; l < 8; ++l)
        if (kept >> l & 1) lane[kept][n++] = l;
  }
};

SPQT_INLINE int compress(vi skip, vi numbers, vf values, int32_t* channel, float* x) {
  static constexpr KeptLanes lanes;
  const int kept = ~_mm256_movemask_ps((__m256)skip) & 255;
  const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)lanes.lane[kept]));
  store(channel, (vi)_mm256_permutevar8x32_epi32((__m256i)numbers, order));
  store(x, (vf)_mm256_permutevar8x32_ps((__m256)values, order));
  return __builtin_popcount(kept);
}
#define SPQT_COMPRESS 1
#endif

#if SPQT_COMPRESS
// Float32 in a row, a vector at a time; what is stored past the count is overwritten by the next or not read.
static int collect_vectors(const Input& in, int32_t* channel, float* x) {
  const float* from = (const float*)in.x;
  const bool each = in.threshold && in.threshold_stride;
  vf limit = splat(in.threshold ? *in.threshold : 0);  // |x| < 0 is never true
  vi numbers;
  for (int l = 0; l < LANES; ++l) numbers[l] = l;
  int count = 0, k = 0;
  for (; k + LANES <= in.inputs; k += LANES, numbers += LANES) {
    const vf value = load<vf>(from + k);
    if (each) limit = load<vf>(in.threshold + k);
    const vi skip = (vf)((vi)value & 0x7fffffff) < limit;
    count += compress(skip, numbers, value, channel + count, x + count);
  }
  for (; k < in.inputs; ++k) {
    channel[count] = k;
    x[count] = from[k];
    count += !(__builtin_fabsf(from[k]) < (each ? in.threshold[k] : limit[0]));
  }
  return count;
}
#endif

static int collect(const Input& in, int32_t* channel, float* x) {
  if (in.type == FLOAT16) return collect_type<FLOAT16>(in, channel, x);
  if (in.type == BFLOAT16) return collect_type<BFLOAT16>(in, channel, x);
#if SPQT_COMPRESS
  if (in.stride == 1) return collect_vectors(in, channel, x);
#endif
  return collect_type<FLOAT32>(in, channel, x);
}

// A vector of channels at a time: what the rows keep of it, then the channels that any of them needs, one by one.
template <Type T, int PADDED>
static int collect_rows_of(const Input& in, int64_t row_stride, int rows, int32_t* channel, float* x,
                           uint32_t* counts) {
  const bool each = in.threshold && in.threshold_stride;
  float kept[PADDED][LANES] = {};
  int count = 0;
  auto put = [&](int k, int lanes, const vi& needed) SPQT_LAMBDA {
    for (int l = 0; l < lanes; ++l) {
      for (int r = 0; r < PADDED; ++r) x[(int64_t)count * PADDED + r] = kept[r][l];
      channel[count] = k + l;
      count += needed[l] != 0;
    }
  };
  vi sums[PADDED] = {};
  vf limit = splat(in.threshold ? *in.threshold : 0);  // |x| < 0 is never true
  int k = 0;
  for (; k + LANES <= in.inputs; k += LANES) {
    vi needed = {};
    if (each) limit = load<vf>(in.threshold + k);
    for (int r = 0; r < rows; ++r) {
      const vf value = load_as_float<T>((const uint8_t*)in.x + r * row_stride, k);
      const vi keeps = ~(vi)((vf)((vi)value & 0x7fffffff) < limit);
      store(kept[r], (vf)((vi)value & keeps));
      sums[r] -= keeps;
      needed |= keeps;
    }
    put(k, LANES, needed);
  }
  vi needed = {};
  for (int r = 0; r < rows; ++r) {
    counts[r] = 0;
    for (int l = 0; l < LANES; ++l) counts[r] += sums[r][l];
    for (int i = k; i < in.inputs; ++i) {
      const float value = scalar<T>((const uint8_t*)in.x + r * row_stride, i);
      const bool keeps = !(__builtin_fabsf(value) < (each ? in.threshold[i] : limit[0]));
      kept[r][i - k] = keeps ? value : 0;
      counts[r] += keeps;
      needed[i - k] |= keeps;
    }
  }
  put(k, in.inputs - k, needed);
  return count;
}

template <int PADDED>
static int collect_padded(const Input& in, int64_t row_stride, int rows, int32_t* channel, float* x,
                          uint32_t* counts) {
  if (in.type == FLOAT16) return collect_rows_of<FLOAT16, PADDED>(in, row_stride, rows, channel, x, counts);
  if (in.type == BFLOAT16) return collect_rows_of<BFLOAT16, PADDED>(in, row_stride, rows, channel, x, counts);
  return collect_rows_of<FLOAT32, PADDED>(in, row_stride, rows, channel, x, counts);
}

static int collect_rows(const Input& in, int64_t row_stride, int rows, int padded, int32_t* channel, float* x,
                        uint32_t* counts) {
  if (padded == 8) return collect_padded<8>(in, row_stride, rows, channel, x, counts);
  if (padded == 4) return collect_padded<4>(in, row_stride, rows, channel, x, counts);
  return collect_padded<2>(in, row_stride, rows, channel, x, counts);
}
