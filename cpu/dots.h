// rows.h with integer dot products: the codes of a row, as bytes, times x as three signed bytes.
//
// 64 inputs share a unit, a power of two with which the largest of them takes 22 bits: x = unit * (65536 * high +
// 256 * middle + low), rounded to the unit, about as a sum of floats is. Sums of four products are exact, and so is
// their sum over the three bytes, which fits 32 bits; unit and scale multiply it once. Rows of any width unpack in
// three operations, and x is taken apart once per call.
#pragma once

constexpr int DOT = 64;       // inputs of one vector of bytes
constexpr int UNIT_BITS = 21;  // of the largest |x| before its last: the high byte stays within 64
constexpr int DOT_PLANES = 3;

// Of 64 inputs, in the room of as many floats.
struct Prepared {
  int8_t bytes[DOT_PLANES][DOT];  // low, middle, high
  float unit;                     // NaN where an input is not finite
};
static_assert(sizeof(Prepared) <= DOT * sizeof(float) && sizeof(Prepared) % alignof(float) == 0);

SPQT_INLINE float unit_of(const float* x) {
  uint32_t top = 0;
  for (int i = 0; i < DOT; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  if (top >= 0x7f800000u) return __builtin_nanf("");
  const int exponent = (int)(top >> 23);
  return bits_float((uint32_t)(exponent > UNIT_BITS ? exponent - UNIT_BITS : 1) << 23);
}

static void prepare_dots(const Input& in, int, int group_size, float* prepared, float* group_sums) {
  for (int first = 0; first < in.inputs; first += DOT, prepared += DOT) {
    float x[DOT] = {};
    for (int i = 0; i < min_of(DOT, in.inputs - first); ++i) x[i] = any_element(in.x, in.type, (first + i) * in.stride);
    Prepared block;
    block.unit = unit_of(x);
    const bool finite = block.unit == block.unit;
    for (int i = 0; i < DOT; ++i) {
      const int whole = finite ? (int)__builtin_rintf(x[i] / block.unit) : 0;
      const uint32_t digits = (uint32_t)(whole + 0x8080) ^ 0x8080;  // each byte from -128 to 127
      for (int p = 0; p < DOT_PLANES; ++p) block.bytes[p][i] = (int8_t)(digits >> 8 * p);
    }
    __builtin_memcpy(prepared, &block, sizeof block);
  }
  sum_groups(in, group_size, group_sums);
}

template <int BITS>
struct DotCodec {
  static constexpr int WORDS = DOT * BITS / 32;

  // Eight codes of eight bits each, from the BITS bytes that begin at byte 8 * q of a vector
  SPQT_INLINE __m512i unpack(const uint8_t* p, int words) {
    const __m512i packed = _mm512_maskz_loadu_epi32((__mmask16)((1u << words) - 1), p);
    if constexpr (BITS == 8) return packed;
    alignas(64) static constexpr auto places = table(std::make_integer_sequence<int, DOT>());
    const __m512i spread = _mm512_permutexvar_epi8(_mm512_load_si512(places.place), packed);
    const __m512i down = _mm512_multishift_epi64_epi8(_mm512_load_si512(places.shift), spread);
    return _mm512_and_si512(down, _mm512_set1_epi8((1 << BITS) - 1));
  }

 private:
  struct Places {
    alignas(64) uint8_t place[DOT];
    alignas(64) uint8_t shift[DOT];
  };
  template <int... I>
  static constexpr Places table(std::integer_sequence<int, I...>) {
    return {{(uint8_t)(I / 8 * BITS + min_of(I % 8, BITS - 1))...}, {(uint8_t)(I % 8 * BITS)...}};
  }
};

struct BytesUp {
  uint8_t byte[DOT];
};
template <int... I>
constexpr BytesUp bytes_up(std::integer_sequence<int, I...>) {
  return {{(uint8_t)(I % 4 ? I % 16 - 1 : 0x80)...}};
}

// sum of codes * x / unit in each lane: of four neighbours
template <int BITS>
SPQT_INLINE vf dot(__m512i codes, const Prepared& x) {
  const __m512i none = _mm512_setzero_si512();
  auto plane = [&](int p) SPQT_LAMBDA { return _mm512_loadu_si512(x.bytes[p]); };
  if constexpr (BITS == 8) {  // the high bytes' sums would not fit beside the others'
    const __m512i high = _mm512_dpbusd_epi32(none, codes, plane(2));
    const __m512i middle = _mm512_dpbusd_epi32(none, codes, plane(1));
    const __m512i rest = _mm512_dpbusd_epi32(_mm512_slli_epi32(middle, 8), codes, plane(0));
    return (vf)_mm512_cvtepi32_ps(high) * splat(65536.0f) + (vf)_mm512_cvtepi32_ps(rest);
  }
  alignas(64) static constexpr auto up = bytes_up(std::make_integer_sequence<int, DOT>());
  auto times256 = [&](__m512i v) SPQT_LAMBDA { return _mm512_shuffle_epi8(v, _mm512_load_si512(up.byte)); };
  __m512i sum = _mm512_dpbusd_epi32(none, codes, plane(2));  // shuffled where a shift would wait for the products' port
  sum = _mm512_dpbusd_epi32(times256(sum), codes, plane(1));
  sum = _mm512_dpbusd_epi32(times256(sum), codes, plane(0));
  return (vf)_mm512_cvtepi32_ps(sum);
}

// The factor of each lane: of 64 inputs, which are of two groups, of one, or of half a one.
template <int GROUP>
SPQT_INLINE vf factor_of(const float* scales, int block) {
  if constexpr (GROUP == 32)
    return permute<vf, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1>(load<vf>(scales + block * 2));
  return splat(scales[block * DOT / GROUP]);
}

// A row's scales as float, and in `totals` what its biases add for each token
template <Type T, int TOKENS>
SPQT_INLINE void start_dots(const Rows& r, int64_t first, int groups, float* scales, vf* totals) {
  const Tile& w = r.weights;
  for (int t = 0; t < TOKENS; ++t) totals[t] = vf{};
  for (int g = 0; g < groups; g += LANES) {
    const int some = min_of(LANES, groups - g);
    store(scales + g, load_as_float<T>(w.scales, first + g, some));
    const vf biases = load_as_float<T>(w.biases, first + g, some);
    for (int t = 0; t < TOKENS; ++t)
      totals[t] += biases * load_as_float<FLOAT32>(r.group_sums + t * r.stride, g, some);
  }
}

template <int BITS, int GROUP, int TOKENS>
static void dots_tile(const Rows& r, float* scales) {
  using C = DotCodec<BITS>;
  const Tile& w = r.weights;
  const int groups = r.inputs / GROUP, words = r.inputs / 32 * BITS;
  for (int m = r.first; m < r.first + r.count; ++m) {
    const int64_t first = m * (int64_t)w.scale_stride;
    vf totals[TOKENS];
    if (w.type == FLOAT32) start_dots<FLOAT32, TOKENS>(r, first, groups, scales, totals);
    if (w.type == FLOAT16) start_dots<FLOAT16, TOKENS>(r, first, groups, scales, totals);
    if (w.type == BFLOAT16) start_dots<BFLOAT16, TOKENS>(r, first, groups, scales, totals);
    const uint8_t* codes = w.codes + m * (int64_t)w.code_stride;
    auto add = [&](int block, int some) SPQT_LAMBDA {
      __builtin_prefetch(codes + block * C::WORDS * 4 + ROWS_AHEAD);
      const __m512i unpacked = C::unpack(codes + block * C::WORDS * 4, some);
      const vf factor = factor_of<GROUP>(scales, block);
      for (int t = 0; t < TOKENS; ++t) {
        const Prepared& x = *(const Prepared*)(r.prepared + t * r.stride + block * DOT);
        totals[t] += dot<BITS>(unpacked, x) * splat(x.unit) * factor;
      }
    };
    int block = 0;
    for (; (block + 1) * C::WORDS <= words; ++block) add(block, C::WORDS);
    if (block * C::WORDS < words) add(block, words - block * C::WORDS);
    for (int t = 0; t < TOKENS; ++t) {
      Output out = r.out;
      out.y = (uint8_t*)r.out.y + t * r.y_stride * (r.out.type == FLOAT32 ? 4 : 2);
      const float y = add_lanes(totals[t]);
      put_row(out, m, 1, &y);
    }
  }
}

template <int BITS, int GROUP>
static void dots_group(const Rows& r, float* scales) {
  if (r.tokens == 1) dots_tile<BITS, GROUP, 1>(r, scales);
  if (r.tokens == 2) dots_tile<BITS, GROUP, 2>(r, scales);
  if (r.tokens == 4) dots_tile<BITS, GROUP, 4>(r, scales);
}

template <int BITS>
static void dots_bits(const Rows& r, float* scales) {
  if (r.weights.group_size == 32) dots_group<BITS, 32>(r, scales);
  if (r.weights.group_size == 64) dots_group<BITS, 64>(r, scales);
  if (r.weights.group_size == 128) dots_group<BITS, 128>(r, scales);
}

static void dots(const Rows& r, float* scales) {
  switch (r.weights.bits) {
    case 2: return dots_bits<2>(r, scales);
    case 3: return dots_bits<3>(r, scales);
    case 4: return dots_bits<4>(r, scales);
    case 5: return dots_bits<5>(r, scales);
    case 6: return dots_bits<6>(r, scales);
    case 8: return dots_bits<8>(r, scales);
  }
}
