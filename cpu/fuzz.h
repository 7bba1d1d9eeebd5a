// What fuzz.cpp's parts share: random arrays, memory that must not be trusted, and sums in double to judge by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "kernels.h"

using Random = std::mt19937;

inline int below(Random& random, int n) { return random() % n; }

template <class T>
T one_of(Random& random, std::initializer_list<T> all) {
  return all.begin()[below(random, all.size())];
}

inline Type any_type(Random& random) { return one_of(random, {FLOAT32, FLOAT32, FLOAT16, BFLOAT16}); }

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GUARD = 0;  // arrays end where they must, and AddressSanitizer sees what goes further
#else
constexpr size_t GUARD = 64;
#endif

// Memory of n elements of a type. Unwritten elements are NaN, and `intact` asks for those and for what follows.
struct Array {
  Type type;
  size_t n;
  std::vector<uint8_t> bytes;

  Array(Type type, size_t n) : type(type), n(n), bytes(n * size() + GUARD, 0xff) {}

  size_t size() const { return type == FLOAT32 ? 4 : 2; }
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  float* floats() { return (float*)bytes.data(); }
  const float* floats() const { return (const float*)bytes.data(); }

  double operator[](size_t i) const {
    uint32_t raw = 0;
    std::memcpy(&raw, &bytes[i * size()], size());
    if (type == FLOAT16) {
      const int exponent = raw >> 10 & 31, fraction = raw & 1023;
      if (exponent == 31) return NAN;  // no infinities are made
      const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      return raw >> 15 ? -magnitude : magnitude;
    }
    if (type == BFLOAT16) raw <<= 16;
    float value;
    std::memcpy(&value, &raw, 4);
    return value;
  }

  // Towards zero, where the type is narrower; as a half, |value| below 65504.
  void set(size_t i, float value) {
    uint32_t raw;
    std::memcpy(&raw, &value, 4);
    const uint32_t exponent = raw >> 23 & 255;
    if (type == BFLOAT16) raw >>= 16;
    if (type == FLOAT16) raw = (raw >> 16 & 0x8000) | (exponent < 113 ? 0 : (exponent - 112) << 10 | (raw >> 13 & 1023));
    std::memcpy(&bytes[i * size()], &raw, size());
  }

  bool is_unwritten(size_t i) const {
    for (size_t b = i * size(); b < (i + 1) * size(); ++b)
      if (bytes[b] != 0xff) return false;
    return true;
  }
  // Elements between rows of `width` that lie `stride` apart, and what follows the array.
  bool intact(size_t width, size_t stride) const {
    for (size_t i = 0; i < n; ++i)
      if (i % stride >= width && !is_unwritten(i)) return false;
    for (size_t b = n * size(); b < bytes.size(); ++b)
      if (bytes[b] != 0xff) return false;
    return true;
  }
};

// n random values, `step` elements apart; as a half some are subnormal.
inline Array random_values(Random& random, Type type, size_t n, float scale, int step = 1) {
  Array made(type, n ? (n - 1) * step + 1 : 0);
  for (size_t i = 0; i < n; ++i) {
    made.set(i * step, (below(random, 2000) - 1000) / 1000.0f * scale);
    if (type == FLOAT16 && below(random, 20) == 0) {
      const uint16_t raw = random() & 0x83ff;
      std::memcpy(&made.bytes[i * step * 2], &raw, 2);
    }
  }
  return made;
}

// A packed matrix whose groups lie along the last axis: `rows` rows of `width` values.
struct Packed {
  int rows, width, bits, group_size;
  std::vector<uint8_t> codes;
  Array scales, biases;

  Packed(Random& random, int rows, int groups)
      : rows(rows), bits(one_of(random, {2, 3, 4, 5, 6, 8})), group_size(one_of(random, {32, 64, 128})),
        scales(any_type(random), 0), biases(scales.type, 0) {
    groups = std::max(1, groups * 32 / group_size);
    width = groups * group_size;
    codes.resize((size_t)rows * width * bits / 8);
    for (uint8_t& c : codes) c = random();
    scales = random_values(random, scales.type, (size_t)rows * groups, 0.01f);
    biases = random_values(random, scales.type, (size_t)rows * groups, 0.01f);
  }

  double value(int row, int i) const {
    const size_t bit = ((size_t)row * width + i) * bits;
    unsigned two = codes[bit / 8];
    if (bit / 8 + 1 < codes.size()) two |= codes[bit / 8 + 1] << 8;
    const unsigned code = two >> bit % 8 & ((1u << bits) - 1);
    const size_t group = ((size_t)row * width + i) / group_size;
    return (double)code * scales[group] + biases[group];
  }

  Tile tile() const {
    return {codes.data(), (size_t)width * bits / 8, scales.data(), biases.data(), (size_t)width / group_size,
            scales.type, width / group_size, group_size, bits};
  }
};

// Sums in double, with the squares of their terms: where terms cancel, their size is what rounding goes by.
struct Sums {
  std::vector<double> want;
  double squares = 1e-30;
  explicit Sums(size_t n) : want(n) {}
  void add(size_t i, double term) {
    want[i] += term;
    squares += term * term;
  }
};

// Whether y, rows of `width` that lie `stride` apart, holds the sums to 1e-5 and what rounding to its type costs.
inline bool close(const char* what, const Array& y, const Sums& sums, size_t width, size_t stride) {
  const double unit = y.type == FLOAT32 ? 0 : y.type == FLOAT16 ? 0x1p-11 : 0x1p-8;
  double error = 0, size = 1e-10 * sums.squares;
  for (size_t i = 0; i < sums.want.size(); ++i) {
    const double off = y[i / width * stride + i % width] - sums.want[i];
    error += off * off;
    size += unit * unit * sums.want[i] * sums.want[i] + (unit ? 0x1p-48 : 0);  // a half's own smallest step
  }
  const bool intact = y.intact(width, stride);
  if (error <= size && intact) return true;
  std::printf("%s %s: error %g of %g allowed%s;", kernels().name, what, std::sqrt(error), std::sqrt(size),
              intact ? "" : ", written outside its rows");
  return false;
}

// Leaves NaN where the next call will have its local arrays.
__attribute__((noinline)) inline void spoil_stack() {
  char local[48 * 1024];
  std::memset(local, 0xff, sizeof local);
  asm volatile("" : : "r"(local) : "memory");
}

// One random case each; false, with a line that says what was wrong.
bool sparse_gemv(Random& random);
bool collected(Random& random);
bool few_rows(Random& random);
bool many_rows(Random& random);
bool one_row(Random& random);
bool few_tokens(Random& random);
bool normalized(Random& random);
bool turned(Random& random);
bool attention(Random& random);
bool gated(Random& random);
bool sum_of_exponentials(Random& random);
bool compensated(Random& random);
bool sloped(Random& random);
