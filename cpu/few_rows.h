// The product of gemv.h for 2, 4 or 8 rows: codes are unpacked once for all of them.
//
// The same operations in the same order for each row, so its bits do not depend on its companions: a channel
// that a row skips adds u = 0. Each unpacked vector of codes serves every row. Where its outputs lie in one group, so
// does one number of u; else u of a column is laid out as vectors, once for all channels of a block.
#pragma once

#if SPQT_MASKED_LOADS || defined(__aarch64__)
constexpr int ACCUMULATORS = 16;  // of 32 registers
#else
constexpr int ACCUMULATORS = 8;  // of 16
#endif
constexpr int MOST_CHANNELS = 32;  // of a block: sums go to L2 and back once for each
// Rows of one pass over a column. Where u needs loads of its own, four rows by two vectors take fewer than eight by one,
// and unpacking twice costs less; as embedded broadcasts it needs none.
#if defined(__x86_64__) && !SPQT_MASKED_LOADS
constexpr int ROWS_AT_ONCE = 4;
#else
constexpr int ROWS_AT_ONCE = 8;
#endif

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
  static constexpr int MOST = MOST_CHANNELS;
  int count;   // channels
  int groups;  // of the tile
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

// One pass over a column: how codes become vectors, and where their sums lie. KINDS: of u in the column.
template <int BITS>
struct AsUnpacked {
  using C = Codec<BITS>;
  static constexpr int PASSES = C::PASSES, SIZE = VECTORS, KINDS = VECTORS / C::SHARED;
  // vectors whose outputs lie in one group each
  static constexpr bool in_one_group(int group_size) { return C::SHARED < VECTORS || group_size * BITS / 32 >= LANES; }
  static constexpr int kind(int, int v) { return v / C::SHARED; }
  static constexpr int first_output(int kind) { return kind * C::COLUMN / KINDS; }

  template <int PASS, int FIRST, int COUNT, class Use>
  SPQT_INLINE void unpack(const uint8_t* p, Use use) {
    C::template unpack<PASS, FIRST, COUNT>(p, use);
  }
  SPQT_INLINE vf sum(const float* sums, int pass, int v) { return load<vf>(sums + (pass * SIZE + v) * LANES); }
  SPQT_INLINE void put(float* sums, int pass, int v, vf sum) { store(sums + (pass * SIZE + v) * LANES, sum); }
};

#if SPQT_HALVES
struct ByHalves {
  static constexpr int PASSES = 1, SIZE = VECTORS, KINDS = 2;
  static constexpr int kind(int, int v) { return v / 4; }
  static constexpr int first_output(int kind) { return kind * 64; }

  template <int PASS, int FIRST, int COUNT, class Use>
  SPQT_INLINE void unpack(const uint8_t* p, Use use) {
    Halves::unpack<FIRST, COUNT>(p, use);
  }
  SPQT_INLINE vf sum(const float* sums, int, int v) { return Halves::sum(sums, v); }
  SPQT_INLINE void put(float* sums, int, int v, vf sum) { Halves::put(sums, v, sum); }
};
#endif

// u of a column by channel and row: read as it is, where a vector's outputs lie in one group
template <int BITS, int ROWS, class View>
struct Broadcast {
  static constexpr bool ONE_NUMBER = true;
  const FewBlock<BITS, ROWS>& block;
  int group[View::KINDS];

  Broadcast(const FewBlock<BITS, ROWS>& b, int column, int group_size) : block(b) {
    for (int kind = 0; kind < View::KINDS; ++kind)
      group[kind] = min_of((column * Codec<BITS>::COLUMN + View::first_output(kind)) / group_size, block.groups - 1);
  }
  SPQT_LAMBDA const float& number(int i, int r, int kind) const { return block.u[i][r][group[kind]]; }
  SPQT_LAMBDA vf operator()(int i, int r, int kind) const { return splat(number(i, r, kind)); }
};

// else laid out once, as vectors: of words, which share theirs
template <int BITS, int ROWS>
struct Laid {
  using Block = FewBlock<BITS, ROWS>;
  static constexpr bool ONE_NUMBER = false;
  alignas(64) float u[Block::MOST][ROWS][LANES];

  Laid(const Block& block, int column, int group_size) {
    if (group_size == 32) lay_out<32>(block, column);
    if (group_size == 64) lay_out<64>(block, column);
    if (group_size == 128) lay_out<128>(block, column);
  }
  template <int GROUP>
  void lay_out(const Block& block, int column) {
    for (int i = 0; i < block.count; ++i)
      for (int r = 0; r < ROWS; ++r) {
        vf each[VECTORS];
        Codec<BITS>::template expand<GROUP>(block.u[i][r], column, each);
        store(u[i][r], each[0]);
      }
  }
  SPQT_LAMBDA vf operator()(int i, int r, int) const { return load<vf>(u[i][r]); }
};

// The lines of the next block that begin in a column
struct Ahead {
  const uint8_t* const* next;
  int first, end;  // bytes
  SPQT_INLINE void fetch(const Ahead& a, int i) {
    for (int line = a.first; line < a.end; line += 64) prefetch(a.next[i] + line);
  }
};

// Rows FROM to FROM + ROWS - 1. FETCHES: a channel's lines of the next block with each channel of this one.
template <int ROWS, class View, int PASS, int FROM, bool FETCHES, int FIRST = 0, class U>
SPQT_INLINE void add_rows(int count, const uint8_t* const* codes, size_t offset, const U& u, float* sums,
                          size_t stride, const Ahead& ahead) {
  constexpr int SOME = min_of(View::SIZE, ACCUMULATORS / ROWS);
  vf sum[ROWS][SOME];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < SOME; ++v) sum[r][v] = View::sum(sums + r * stride, PASS, FIRST + v);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    if constexpr (FETCHES && FIRST == 0) Ahead::fetch(ahead, i);
    vf unpacked[SOME];
    auto keep = [&](int v, vf code) SPQT_LAMBDA { unpacked[v - FIRST] = code; };
    View::template unpack<PASS, FIRST, SOME>(codes[i] + offset, keep);
    for (int r = 0; r < ROWS; ++r) {
#if SPQT_MASKED_LOADS
      // A number that the multiplication itself reads costs nothing; a load of its own a third of its time (Zen 4).
      if constexpr (U::ONE_NUMBER) {
        for (int v = 0; v < SOME; ++v)
          asm("vfmadd231ps %1%{1to16%}, %2, %0"
              : "+v"(sum[r][v])
              : "m"(u.number(i, FROM + r, View::kind(PASS, FIRST + v))), "v"(unpacked[v]));
        continue;
      }
#endif
      vf one;
      for (int v = 0; v < SOME; ++v) {
        if (v == 0 || View::kind(PASS, FIRST + v) != View::kind(PASS, FIRST + v - 1)) {
          one = u(i, FROM + r, View::kind(PASS, FIRST + v));
          in_register(one);
        }
        sum[r][v] = multiply_add(one, unpacked[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < SOME; ++v) View::put(sums + r * stride, PASS, FIRST + v, sum[r][v]);
  if constexpr (FIRST + SOME < View::SIZE)
    add_rows<ROWS, View, PASS, FROM, FETCHES, FIRST + SOME>(count, codes, offset, u, sums, stride, ahead);
}

template <int BITS, int ROWS, class View, class U>
static void add_few(const FewBlock<BITS, ROWS>& block, const Tile& tile, float* sums, size_t stride) {
  using C = Codec<BITS>;
  constexpr int SOME = min_of(ROWS, ROWS_AT_ONCE);
  const int bytes = tile.groups * tile.group_size * BITS / 8;
  alignas(64) uint8_t last[block.MOST][C::COLUMN_BYTES];  // a column that chunks end in, filled up with zeros
  const uint8_t* of_last[block.MOST];
  for (int begin = 0, column = 0; begin < bytes; begin += C::COLUMN_BYTES, ++column, sums += C::COLUMN) {
    const Ahead ahead{block.next, (begin + 63) / 64 * 64, min_of(begin + C::COLUMN_BYTES, bytes)};
    const bool whole = begin + C::COLUMN_BYTES <= bytes;
    for (int i = 0; i < block.count && !whole; ++i) {
      __builtin_memset(last[i], 0, C::COLUMN_BYTES);
      for (int at = begin; at < bytes; at += 4) __builtin_memcpy(last[i] + at - begin, block.codes[i] + at, 4);
      of_last[i] = last[i];
    }
    const uint8_t* const* codes = whole ? block.codes : of_last;
    const size_t offset = whole ? begin : 0;
    const U u(block, column, tile.group_size);
    auto add = [&]<int PASS, int FROM>() SPQT_LAMBDA {
      constexpr bool FETCHES = PASS == 0 && FROM == 0;
      float* to = sums + FROM * stride;
      if (block.count == block.MOST)  // a number that compilers know
        add_rows<SOME, View, PASS, FROM, FETCHES>(block.MOST, codes, offset, u, to, stride, ahead);
      else
        add_rows<SOME, View, PASS, FROM, FETCHES>(block.count, codes, offset, u, to, stride, ahead);
    };
    add.template operator()<0, 0>();
    if constexpr (SOME < ROWS) add.template operator()<0, SOME>();
    if constexpr (View::PASSES == 2) add.template operator()<1, 0>();
    if constexpr (View::PASSES == 2 && SOME < ROWS) add.template operator()<1, SOME>();
  }
}

template <int BITS, int ROWS>
static void few_rows_tile(const Tile& tile, const Active& active, float* partial) {
  using Unpacked = AsUnpacked<BITS>;
  const size_t size = partial_size(tile.groups, tile.group_size), stride = active.row_stride;
  for (int r = 0; r < ROWS; ++r)
    for (size_t i = 0; i < size; i += LANES) store(partial + r * stride + i, vf{});
  float* bias_sums = partial + partial_sums(tile.groups, tile.group_size);
  FewBlock<BITS, ROWS> block;
  block.groups = tile.groups;
  auto add = add_few<BITS, ROWS, Unpacked, Broadcast<BITS, ROWS, Unpacked>>;
  if constexpr (Codec<BITS>::SHARED == VECTORS) {
    if (!Unpacked::in_one_group(tile.group_size)) add = add_few<BITS, ROWS, Unpacked, Laid<BITS, ROWS>>;
  }
#if SPQT_HALVES
  if constexpr (HAS_HALVES<BITS, 64>) {
    if (tile.group_size == 64) add = add_few<BITS, ROWS, ByHalves, Broadcast<BITS, ROWS, ByHalves>>;
  }
#endif
  for (int first = 0; first < active.count; first += block.MOST) {
    start_few(tile, active, first, block, bias_sums);
    add(block, tile, partial, stride);
  }
}

// About as measured from a cache by AVX2 on Zen 3; with AVX-512 somewhat less than on Zen 4, where it was 1.9, 3.2, 6.3 and
// 1.3, 1.9, 3.1 (docs/log/cpu.md). Where one row's codes are converted it costs more, and several cost less of it.
static double together(int rows, int bits) {
  const bool words = bits == 2 || bits == 4;
  const int place = rows == 2 ? 0 : rows == 4 ? 1 : 2;
#if SPQT_MASKED_LOADS
  constexpr double WORDS[] = {1.6, 2.8, 5.4}, BYTES[] = {1.25, 1.8, 3};
  return (words ? WORDS : BYTES)[place];
#else
  constexpr double WORDS[] = {2.2, 4.1, 7.5}, CONVERTED[] = {1.7, 3.2, 5.8}, BYTES[] = {1.5, 2.3, 4.6};
  return (!words ? BYTES : takes_subnormals() ? WORDS : CONVERTED)[place];
#endif
}
