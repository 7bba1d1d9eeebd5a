// When codes may be multiplied as the subnormal floats that their masked bits are, without a conversion.
//
// bits * 2^-149 times u * 2^n is the product times 2^(n - 149), so sums are those of converted codes times a power of
// two, in every bit, while nothing overflows and no u is so small that bits are lost. Some processors (Zen, most of
// Arm's) multiply subnormal numbers as fast as others, some (Intel's) take a hundred times as long.
#pragma once

// Powers of two that x is multiplied by, and then the sums.
struct Powers {
  float up, down;
};

// Between these u * 2^n loses nothing: products are multiples of 2^-149, and finite.
constexpr uint32_t LEAST_U = 0x4b000000, MOST_U = 0x7f800000;  // 2^23 and infinity, as bits
constexpr int X_BITS = 111;           // x becomes less than 2^111: times any float16 it is finite
constexpr float LEAST_X = 0x1p47f;    // times the least float16, 2^-24, it is not below LEAST_U
constexpr int LEAST_EXPONENT = -16, MOST_EXPONENT = 88;  // of the largest x: `up` and `down` are finite

SPQT_INLINE vi out_of_range(vf u) {
  const vu bits = (vu)u & 0x7fffffffu;
  return (vi)(bits - LEAST_U >= MOST_U - LEAST_U) & (vi)(bits != 0);
}

SPQT_INLINE bool out_of_range(float u) {
  const uint32_t bits = float_bits(u) & 0x7fffffffu;
  return bits - LEAST_U >= MOST_U - LEAST_U && bits;
}

// Whether x has powers: all but zeros between LEAST_X and 2^111 once they are raised. What is NaN stays NaN.
static bool powers_of(const Active& active, Powers& powers) {
  float most = 0, least = __builtin_inff();
  vf mosts = {}, leasts = splat(least);
  int i = 0;
  for (; i + LANES <= active.count; i += LANES) {
    const vf size = (vf)(load<vu>(active.x + i) & 0x7fffffffu);
    mosts = size > mosts ? size : mosts;
    leasts = ((size < leasts) & (size > vf{})) ? size : leasts;
  }
  for (int l = 0; l < LANES; ++l) {
    most = mosts[l] > most ? mosts[l] : most;
    least = leasts[l] < least ? leasts[l] : least;
  }
  for (; i < active.count; ++i) {
    const float size = __builtin_fabsf(active.x[i]);
    most = size > most ? size : most;
    least = size > 0 && size < least ? size : least;
  }
  int exponent = (int)(float_bits(most) >> 23) - 126;  // most < 2^exponent
  if (exponent < LEAST_EXPONENT) exponent = LEAST_EXPONENT;
  if (most == 0 || exponent > MOST_EXPONENT) return false;
  powers.up = bits_float((uint32_t)(X_BITS - exponent + 127) << 23);
  powers.down = bits_float((uint32_t)(149 - X_BITS + exponent + 127) << 23);
  return least * powers.up >= LEAST_X;
}

// Whether this thread's arithmetic keeps subnormal numbers: libraries built for fast mathematics switch it off.
SPQT_INLINE bool keeps_subnormals() {
#if defined(__x86_64__)
  return !(__builtin_ia32_stmxcsr() & 0x8040);  // flush to zero, denormals are zero
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return !(control & 1 << 24);
#else
  return false;
#endif
}

// Nanoseconds of some multiplications by what bits are as a float.
static int64_t multiply_time(uint32_t bits) {
  const volatile uint32_t given = bits;
  vu factor = vu{} + given;
  vf sums[8] = {};
  timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < 1000; ++i)
    for (int s = 0; s < 8; ++s) {
      sums[s] += (vf)factor * splat(0x1p60f);
#if defined(__x86_64__)
      asm volatile("" : "+x"(sums[s]));
#elif defined(__aarch64__)
      asm volatile("" : "+w"(sums[s]));
#endif
    }
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (end.tv_sec - start.tv_sec) * 1000000000ll + end.tv_nsec - start.tv_nsec;
}

static bool measure_subnormals() {
  int64_t normal = INT64_MAX, subnormal = INT64_MAX;
  for (int i = 0; i < 5; ++i) {
    const int64_t one = multiply_time(0x3f800000), other = multiply_time(0xf0);
    normal = one < normal ? one : normal;
    subnormal = other < subnormal ? other : subnormal;
  }
  return subnormal < 2 * normal;
}

// Whether products may take codes so in this thread.
static bool takes_subnormals() {
  const int wish = subnormals();
  if (wish == NEVER || !keeps_subnormals()) return false;
  static const bool are_free = measure_subnormals();
  return wish == ALWAYS || are_free;
}
