// The Metal words that the kernel bodies use, declared for clang: only types matter, nothing runs.
// Address spaces are real, so that a pointer into the wrong one is an error.
#pragma once
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define METAL_FUNC inline __attribute__((always_inline))
#define double static_assert(false, "Metal has no double");

typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef ushort ushort2 __attribute__((ext_vector_type(2)));
typedef unsigned char uchar4 __attribute__((ext_vector_type(4)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef _Float16 half;
typedef _Float16 float16_t;
// A type of its own that becomes float in arithmetic: clang 14's __bf16 converts to nothing.
typedef __fp16 bfloat16_t;

namespace mem_flags {
enum { mem_none, mem_device, mem_threadgroup };
}
void threadgroup_barrier(int);
// Overloads as in Metal, so that a call which is ambiguous there is ambiguous here.
uint simd_prefix_exclusive_sum(uint);
int simd_prefix_exclusive_sum(int);
float simd_prefix_exclusive_sum(float);
uint simd_broadcast(uint, ushort);
int simd_broadcast(int, ushort);
float simd_broadcast(float, ushort);
float simd_shuffle_xor(float, ushort);
uint simd_shuffle_xor(uint, ushort);
int simd_shuffle_xor(int, ushort);
__attribute__((const))
float fma(float, float, float);
__attribute__((const)) float exp(float);
__attribute__((const)) half exp(half);
__attribute__((const)) float rsqrt(float);
__attribute__((const)) half rsqrt(half);
__attribute__((const)) float rint(float);
__attribute__((const)) half rint(half);
__attribute__((const)) float fabs(float);
__attribute__((const)) uint min(uint, uint);
__attribute__((const)) int min(int, int);
__attribute__((const)) float min(float, float);
__attribute__((const)) half fabs(half);
__attribute__((const)) half fma(half, half, half);

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the bits");
  return __builtin_bit_cast(To, from);
}

// No words of Metal's: matrix_rows.metal and gemm_rows.metal, which run on CUDA alone, are checked all the same.
template <typename T>
uint pack_pair(float, float);
template <typename T>
float4 multiply_tile(uint4, uint2, float4);
template <typename T>
uint pair_fma(uint, uint, uint);
uint masked_or(uint, uint, uint);
template <bool TRANSPOSED>
uint4 load_tiles(const threadgroup uint4*);
