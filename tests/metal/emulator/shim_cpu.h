// The Metal words that the kernel bodies use, spelled for g++; each memory access is seen by books.h
// through the calls that -fsanitize=thread inserts. Included before the text that MLX generates.
#pragma once
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;

#define device
#define constant
#define threadgroup
#define METAL_FUNC inline

struct uint3 {
  uint x, y, z;
};
struct alignas(4) ushort2 {
  ushort x, y;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(8) uint2 {
  uint x, y;
};
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// What a lane is, set by the runtime before the lane runs.
struct Lane {
  uint3 thread_position_in_threadgroup;
  uint3 threadgroup_position_in_grid;
  uint thread_index_in_simdgroup;
  uint simdgroup_index_in_threadgroup;
};

extern "C" {
void emulator_barrier();
uint emulator_prefix_sum(uint value);
float emulator_shuffle_xor(float value, uint mask);
uint emulator_broadcast(uint value, uint lane);
// A lane's part of a 16 x 8 tile c += a b over 16 channels: eight of a, four of b, four of c, in the order of the
// words that hold them.
void emulator_multiply_tile(const float* a, const float* b, float* c);
// A lane's row of 8 x 8 tiles, as eight numbers of 16 bits; in its place what the lane gets of the four tiles.
void emulator_share_tiles(ushort* row, bool transposed);
// Names a threadgroup array and checks one index; returns the index, or 0 after a report.
uint64_t emulator_index(const void* array, uint64_t elements, uint64_t size, uint64_t index);
}

// A threadgroup array: emulator.py rewrites `threadgroup T name[N];` to this, and arrays in a struct ...Memory.
template <typename T, uint64_t N>
struct Threadgroup {
  T at[N];
  T& operator[](uint64_t index) { return at[emulator_index(at, N, sizeof(T), index)]; }
};

namespace mem_flags {
enum { mem_none, mem_device, mem_threadgroup };
}
inline void threadgroup_barrier(int) { emulator_barrier(); }
inline uint simd_prefix_exclusive_sum(uint value) { return emulator_prefix_sum(value); }
inline float simd_shuffle_xor(float value, ushort mask) { return emulator_shuffle_xor(value, mask); }
inline uint simd_broadcast(uint value, ushort lane) { return emulator_broadcast(value, lane); }

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float exp(float a) { return __builtin_expf(a); }
inline float rsqrt(float a) { return 1.0f / __builtin_sqrtf(a); }
inline float rint(float a) { return __builtin_rintf(a); }
inline float fabs(float a) { return __builtin_fabsf(a); }
inline uint min(uint a, uint b) { return a < b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

typedef _Float16 half;
typedef _Float16 float16_t;

// Stored as 16 bits, rounded to nearest even from float, as Metal's bfloat.
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    const uint wide = as_type<uint>(value);
    const bool nan = value != value;
    bits = nan ? 0x7FC0 : uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
  }
  operator float() const { return as_type<float>(uint(bits) << 16); }
};

// The words of matrix_rows.metal and gemm_rows.metal.
template <typename T>
inline uint pack_pair(float low, float high) {
  return as_type<ushort>(T(low)) | uint(as_type<ushort>(T(high))) << 16;
}
template <typename T>
inline uint pair_fma(uint a, uint b, uint c) {
  float sums[2];
  for (int i = 0; i < 2; ++i) {
    const ushort own[3] = {ushort(a >> 16 * i), ushort(b >> 16 * i), ushort(c >> 16 * i)};
    sums[i] = float(double(float(as_type<T>(own[0]))) * float(as_type<T>(own[1])) + float(as_type<T>(own[2])));
  }
  return pack_pair<T>(sums[0], sums[1]);
}
inline uint masked_or(uint word, uint mask, uint bits) { return (word & mask) | bits; }
template <typename T>
inline float4 multiply_tile(uint4 a, uint2 b, float4 c) {
  const uint words[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
  float apart[12];
  for (int i = 0; i < 6; ++i) {
    apart[2 * i] = float(as_type<T>(ushort(words[i])));
    apart[2 * i + 1] = float(as_type<T>(ushort(words[i] >> 16)));
  }
  float own[4] = {c.x, c.y, c.z, c.w};
  emulator_multiply_tile(apart, apart + 8, own);
  c.x = own[0];
  c.y = own[1];
  c.z = own[2];
  c.w = own[3];
  return c;
}
template <bool TRANSPOSED>
inline uint4 load_tiles(const uint4* unit) {
  const uint4 row = *unit;
  ushort numbers[8];
  __builtin_memcpy(numbers, &row, sizeof row);
  emulator_share_tiles(numbers, TRANSPOSED);
  uint4 tiles;
  __builtin_memcpy(&tiles, numbers, sizeof tiles);
  return tiles;
}
