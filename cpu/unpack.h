// Packed codes to floats, for every bit width.
//
// Codes are a little-endian bit stream, so 32 of them fill `BITS` words. A column is the run of codes that
// becomes eight vectors at once. Codes are masked in place and converted without shifting them down: lane
// l of vector v then holds code * 2^shift(v, l), and whoever sums them scales the sum once.
#pragma once

constexpr int VECTORS = 8;  // of one column and pass: as many accumulators as 16 registers allow

constexpr int min_of(int a, int b) { return a < b ? a : b; }

// How masked bits become a float: converted, or as they are. Up to 16 bits at the bottom of a word are a subnormal
// float, bits * 2^-149, exactly; subnormal.h says when a product may take them so.
struct Converted {
  SPQT_INLINE vf of(vu bits) { return to_float(bits); }
};
struct Subnormal {
  SPQT_INLINE vf of(vu bits) { return (vf)bits; }
};

template <int BITS, int... I>
struct WordMasks {
  alignas(64) uint32_t lanes[sizeof...(I)] = {(((1u << BITS) - 1) << (I / LANES * BITS))...};
};
template <int BITS, int... I>
constexpr WordMasks<BITS, I...> word_masks_of(std::integer_sequence<int, I...>) {
  return {};
}
template <int BITS>
constexpr auto word_masks = word_masks_of<BITS>(std::make_integer_sequence<int, 16 / BITS * LANES>());

// 2 and 4 bits: a vector of words, code j of every word in one vector.
template <int BITS>
struct WordCodec {
  static constexpr int WIDTH = LANES;
  static constexpr int PASSES = 4 / BITS;  // eight codes of each word a pass
  static constexpr int COLUMN = LANES * 32 / BITS;
  static constexpr int COLUMN_BYTES = LANES * 4;
  static constexpr int SHARED = VECTORS;  // vectors whose lanes have the same groups
  static constexpr int PER_HALF = min_of(VECTORS, 16 / BITS);  // codes in half a word

  static constexpr int index(int pass, int v, int lane) { return lane * (32 / BITS) + pass * VECTORS + v; }
  static constexpr int shift(int, int v, int) { return v % PER_HALF * BITS; }

  // use(v, codes) for vectors FIRST to FIRST + COUNT - 1
  template <int PASS, int FIRST = 0, int COUNT = VECTORS, class As = Converted, class Use>
  SPQT_INLINE void unpack(const uint8_t* p, Use use) {
    unpack_words<PASS, FIRST, COUNT, As>(load<vu>(p), use);
  }

  template <int PASS, int FIRST = 0, int COUNT = VECTORS, class As = Converted, class Use>
  SPQT_INLINE void unpack_part(const uint8_t* p, int bytes, Use use) {
    unpack_words<PASS, FIRST, COUNT, As>(load_words(p, bytes / 4), use);
  }

  template <int PASS, int FIRST, int COUNT, class As, class Use>
  SPQT_INLINE void unpack_words(vu words, Use use) {
    const uint32_t *masks = word_masks<BITS>.lanes, *held = masks;
#if defined(__AVX2__) && !defined(__AVX512F__)
    // From memory each time: in registers they push out the accumulators. Three have room where nothing is converted.
    asm("" : "+r"(masks));
    if constexpr (!std::is_same_v<As, Subnormal>) held = masks;
#endif
    vu high = words >> 16;  // bit 31 must not reach the signed conversion
    for (int v = FIRST; v < FIRST + COUNT; ++v) {
      vu from = PASS == 1 || v >= PER_HALF ? high : words;
      use(v, As::of(from & load<vu>((v % PER_HALF < 3 ? held : masks) + v % PER_HALF * LANES)));
    }
  }

  // u of every lane from u by group: a word never crosses groups
  template <int GROUP>
  SPQT_INLINE void expand(const float* u, int column, vf out[VECTORS]) {
    constexpr int WORDS = GROUP * BITS / 32;  // of one group
    vf one;
    if constexpr (WORDS >= LANES) {
      one = splat(u[column * LANES / WORDS]);
    } else if constexpr (LANES / WORDS == 2) {  // eight bytes: a whole vector would lie across two lines
      vf some = (vf)(load<uint64_t>(u + column * 2) - vq{});
      one = spread<WORDS>(some, std::make_integer_sequence<int, LANES>());
    } else {
      vf some = load<vf>(u + column * (LANES / WORDS));
      one = spread<WORDS>(some, std::make_integer_sequence<int, LANES>());
    }
    for (int v = 0; v < VECTORS; ++v) out[v] = one;
  }

  template <int WORDS, int... I>
  SPQT_INLINE vf spread(vf v, std::integer_sequence<int, I...>) {
    return permute<vf, (I / WORDS)...>(v);
  }
};

// 3, 5, 6 and 8 bits: units of 32 codes; each lane fetches the two bytes its code lies in.
template <int BITS>
struct ByteCodec {
  static constexpr int WIDTH = LANES;
  static constexpr int PASSES = 1;
  static constexpr int COLUMN = LANES * VECTORS;
  static constexpr int COLUMN_BYTES = LANES * BITS;
  static constexpr int PER_UNIT = 32 / LANES;  // vectors
  static constexpr int SHARED = PER_UNIT;
  static constexpr int WINDOW = 8;             // bytes that eight codes lie in, kept inside the unit

  static constexpr int index(int, int v, int lane) { return v * LANES + lane; }
  static constexpr int bit(int v, int lane) { return (v % PER_UNIT * LANES + lane) * BITS; }
  static constexpr int shift(int, int v, int lane) { return bit(v, lane) % 8; }
  // first byte of the window of lane `lane`, from the start of the unit
  static constexpr int start(int v, int lane) { return min_of(bit(v, lane / 8 * 8) / 8, 4 * BITS - WINDOW); }
  // which byte of the (repeated) window goes to byte `i` of the vector
  static constexpr int source(int v, int i) {
    int lane = i / 4, byte = bit(v, lane) / 8 - start(v, lane) + (i % 4 > 0);
    return i / 16 * 16 + (lane >= 8 ? WINDOW : 0) + min_of(byte, WINDOW - 1);
  }

  template <int V, class As = Converted, int... BYTE, int... LANE>
  SPQT_INLINE vf unpack_vector(const uint8_t* unit, std::integer_sequence<int, BYTE...>,
                                      std::integer_sequence<int, LANE...>) {
    vq window = load<uint64_t>(unit + start(V, 0)) - vq{};
    if constexpr (LANES == 16) window = in_odd(window, load<uint64_t>(unit + start(V, LANES - 1)));
    vu codes = (vu)permute<vbytes, source(V, BYTE)...>((vbytes)window);
    constexpr uint32_t MASK = (1u << BITS) - 1;
    return As::of(codes & (vu){(MASK << shift(0, V, LANE))...});
  }

#if defined(__AVX2__) && !defined(__AVX512F__)
  // 16 bytes serve all vectors that lie in them whole: loads are what limits, with 16 registers
  static constexpr int PER_LOAD = 16 / BITS;
  static constexpr int load_at(int v) { return min_of(v / PER_LOAD * PER_LOAD * BITS, COLUMN_BYTES - 16); }
  static constexpr int byte_of(int v, int i) {
    return i / 16 * 16 + min_of((v * LANES + i / 4) * BITS / 8 - load_at(v) + (i % 4 > 0), 15);
  }

  template <int V, class As, int... BYTE, int... LANE>
  SPQT_INLINE vf unpack_from(vq bytes, std::integer_sequence<int, BYTE...>, std::integer_sequence<int, LANE...>) {
    vu codes = (vu)permute<vbytes, byte_of(V, BYTE)...>((vbytes)bytes);
    constexpr uint32_t MASK = (1u << BITS) - 1;
    return As::of(codes & (vu){(MASK << shift(0, V, LANE))...});
  }

  template <int FIRST, class As, class Use, int... V>
  SPQT_INLINE void unpack_all(const uint8_t* p, Use use, std::integer_sequence<int, V...>) {
    vq bytes;
    auto load_for = [&](int v) SPQT_LAMBDA {
      if (v == FIRST || load_at(v) != load_at(v - 1))
        bytes = (vq)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(p + load_at(v))));
    };
    ((load_for(FIRST + V), use(FIRST + V, unpack_from<FIRST + V, As>(bytes, std::make_integer_sequence<int, LANES * 4>(),
                                                                     std::make_integer_sequence<int, LANES>()))),
     ...);
  }
#else
  template <int FIRST, class As, class Use, int... V>
  SPQT_INLINE void unpack_all(const uint8_t* p, Use use, std::integer_sequence<int, V...>) {
    (use(FIRST + V, unpack_vector<FIRST + V, As>(p + (FIRST + V) / PER_UNIT * 4 * BITS,
                                             std::make_integer_sequence<int, LANES * 4>(),
                                             std::make_integer_sequence<int, LANES>())),
     ...);
  }
#endif

  template <int PASS, int FIRST = 0, int COUNT = VECTORS, class As = Converted, class Use>
  SPQT_INLINE void unpack(const uint8_t* p, Use use) {
    unpack_all<FIRST, As>(p, use, std::make_integer_sequence<int, COUNT>());
  }

  template <int PASS, int FIRST = 0, int COUNT = VECTORS, class As = Converted, class Use>
  SPQT_INLINE void unpack_part(const uint8_t* p, int bytes, Use use) {
    alignas(64) uint8_t whole[COLUMN_BYTES] = {};
    for (int i = 0; i < bytes; i += 4) __builtin_memcpy(whole + i, p + i, 4);
    unpack<PASS, FIRST, COUNT, As>(whole, use);
  }

  template <int GROUP>
  SPQT_INLINE void expand(const float* u, int column, vf out[VECTORS]) {
    for (int v = 0; v < VECTORS; ++v) out[v] = splat(u[(column * COLUMN + v / PER_UNIT * 32) / GROUP]);
  }
};

template <int BITS>
using Codec = std::conditional_t<BITS == 2 || BITS == 4, WordCodec<BITS>, ByteCodec<BITS>>;

// 4 bits in groups of 64 with vectors of 16: a group's words fill half a vector, so one half takes their lower four codes
// and the other their upper four, and a group has four vectors. Vectors 0 to 3 are of a column's first group.
#if SPQT_MASKED_LOADS && defined(__AVX512DQ__)
#define SPQT_HALVES 1
struct Halves {
  template <int FIRST, int COUNT, class As = Converted, class Use>
  SPQT_INLINE void unpack(const uint8_t* column, Use use) {
    vu codes;
    for (int v = FIRST; v < FIRST + COUNT; ++v) {
      if (v == FIRST || v % 4 == 0) {
        const __m256i words = _mm256_loadu_si256((const __m256i*)(column + v / 4 * 32));
        codes = (vu)_mm512_broadcast_i64x4(words) >> (vu){0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
      }
      use(v, As::of(codes & (0xfu << 4 * (v % 4))));
    }
  }
  // sums of vector v, where WordCodec has the same outputs
  static constexpr int place(int v) { return v % 4 * LANES + v / 4 * 8; }
  SPQT_INLINE vf sum(const float* sums, int v) {
    const __m256 low = _mm256_loadu_ps(sums + place(v)), high = _mm256_loadu_ps(sums + place(v) + 4 * LANES);
    return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  SPQT_INLINE void put(float* sums, int v, vf sum) {
    _mm256_storeu_ps(sums + place(v), _mm512_castps512_ps256((__m512)sum));
    _mm256_storeu_ps(sums + place(v) + 4 * LANES, _mm512_extractf32x8_ps((__m512)sum, 1));
  }
};
#else
#define SPQT_HALVES 0
#endif
template <int BITS, int GROUP>
constexpr bool HAS_HALVES = SPQT_HALVES && BITS == 4 && GROUP == 64;
