// Vectors of one instruction set, through the compiler's vector extensions.
//
// Included only by isa.cpp, inside the namespace of the set being compiled; it may include nothing that
// defines functions, or the linker could pick a copy made for a newer machine.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int LANES = 16;  // 32-bit elements of one vector
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // NEON, SSE2, or whatever the compiler makes of it
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint8_t vbytes __attribute__((vector_size(LANES * 4)));
typedef uint64_t vq __attribute__((vector_size(LANES * 4)));

#define SPQT_INLINE static inline __attribute__((always_inline))
#define SPQT_LAMBDA __attribute__((always_inline))

template <class V>
SPQT_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
SPQT_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// A line that is read soon, into L2: on Zen 4 lines that wait for L1 hold up loads (docs/log/cpu.md).
SPQT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

SPQT_INLINE vf splat(float x) {
  return x - vf{};  // exact, so the subtraction is folded away: one broadcast
}
// a * b + c, rounded once where the instruction set can, however the compiler is set: kernels of one row and of several
// have to agree in every bit
SPQT_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
SPQT_INLINE vf to_float(vu v) { return __builtin_convertvector((vi)v, vf); }

// v with another value in its odd places
SPQT_INLINE vq in_odd(vq v, uint64_t value) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return (vq)_mm512_mask_set1_epi64((__m512i)v, 0xaa, (long long)value);  // one by one a compiler writes five
#else
  for (int q = 1; q < LANES / 2; q += 2) v[q] = value;
  return v;
#endif
}

// lane l of the result is lane I[l] of v
template <class V, int... I>
SPQT_INLINE V permute(V v) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, I...);
#else
  typedef __typeof__(v == v) Index;
  return __builtin_shuffle(v, (Index){I...});
#endif
}

template <int STEP, int... I>
SPQT_INLINE vf rotate_lanes(vf v, std::integer_sequence<int, I...>) {
  return permute<vf, ((I + STEP) % LANES)...>(v);
}

template <int STEP>
SPQT_INLINE vf fold_add(vf v) {
  if constexpr (STEP == 0) return v;
  else return fold_add<STEP / 2>(v + rotate_lanes<STEP>(v, std::make_integer_sequence<int, LANES>()));
}

SPQT_INLINE float add_lanes(vf v) { return fold_add<LANES / 2>(v)[0]; }

// Words 0 .. n-1 at p, zeros above; n < LANES. Reads nothing past word n-1.
SPQT_INLINE vu load_words(const uint8_t* p, int n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return (vu)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
  vi lane;
  for (int l = 0; l < LANES; ++l) lane[l] = l;
  return (vu)_mm256_maskload_epi32((const int*)p, (__m256i)(lane < (vi{} + n)));
#else
  uint32_t words[LANES] = {};
  for (int l = 0; l < n; ++l) __builtin_memcpy(words + l, p + 4 * l, 4);
  return load<vu>(words);
#endif
}

SPQT_INLINE float bits_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

SPQT_INLINE uint32_t float_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

SPQT_INLINE vu widen(vh h) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

// IEEE half to float; the multiply by 2^112 rebuilds the exponent, subnormals included.
SPQT_INLINE vf half_to_float(vh h) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vu wide = widen(h);
  vu magnitude = (wide & 0x7fffu) << 13;
  vu special = (vu)((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinities and NaN
  vf scaled = (vf)magnitude * splat(0x1p112f);
  return (vf)((vu)scaled | special | ((wide & 0x8000u) << 16));
#endif
}

SPQT_INLINE vf bfloat_to_float(vh h) { return (vf)(widen(h) << 16); }

// LANES elements of a float array of the given type, as float
template <Type T>
SPQT_INLINE vf load_as_float(const void* p, int64_t first) {
  if constexpr (T == FLOAT32) return load<vf>((const float*)p + first);
  vh raw = load<vh>((const uint16_t*)p + first);
  if constexpr (T == FLOAT16) return half_to_float(raw);
  return bfloat_to_float(raw);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SPQT_MASKED_LOADS 1
// the same for n < LANES elements, zeros above
template <Type T>
SPQT_INLINE vf load_as_float(const void* p, int64_t first, int n) {
  const __mmask16 some = (__mmask16)((1u << n) - 1);
  if constexpr (T == FLOAT32) return (vf)_mm512_maskz_loadu_ps(some, (const float*)p + first);
  vh raw = (vh)_mm256_maskz_loadu_epi16(some, (const uint16_t*)p + first);
  if constexpr (T == FLOAT16) return half_to_float(raw);
  return bfloat_to_float(raw);
}
#else
#define SPQT_MASKED_LOADS 0
#endif

template <Type T>
SPQT_INLINE float element(const void* p, int64_t i) {
  if constexpr (T == FLOAT32) return ((const float*)p)[i];
  uint16_t raw = ((const uint16_t*)p)[i];
  if constexpr (T == BFLOAT16) return bits_float((uint32_t)raw << 16);
  float magnitude = bits_float((raw & 0x7fffu) << 13) * 0x1p112f;
  uint32_t special = (raw & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  return bits_float(float_bits(magnitude) | special | (raw & 0x8000u) << 16);
}

template <Type T>
SPQT_INLINE float scalar(const void* p, int64_t i) {
#if defined(__F16C__)
  if constexpr (T == FLOAT16) return _cvtsh_ss(((const uint16_t*)p)[i]);
#endif
  return element<T>(p, i);
}

SPQT_INLINE float any_element(const void* p, Type type, int64_t i) {
  if (type == FLOAT16) return element<FLOAT16>(p, i);
  return type == BFLOAT16 ? element<BFLOAT16>(p, i) : element<FLOAT32>(p, i);
}

// IEEE half, rounded to nearest even
SPQT_INLINE uint16_t half_of(float value) {
  uint32_t raw = float_bits(value), magnitude = raw & 0x7fffffffu;
  uint16_t sign = (uint16_t)(raw >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds past the largest half
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the half's bits at the bottom
    return sign | (uint16_t)(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (uint16_t)((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// round to nearest even, as MLX rounds
template <Type T>
SPQT_INLINE void put(void* p, int64_t i, float value) {
  if constexpr (T == FLOAT32) {
    ((float*)p)[i] = value;
  } else if constexpr (T == BFLOAT16) {
    uint32_t raw = float_bits(value);
    bool nan = value != value;
    ((uint16_t*)p)[i] = nan ? 0x7fc0 : (uint16_t)((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
  } else {
    ((uint16_t*)p)[i] = half_of(value);
  }
}
