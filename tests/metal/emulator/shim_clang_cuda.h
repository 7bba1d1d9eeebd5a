// What shim_cuda.h expects of CUDA's own headers, declared for clang alone: the device half of a CUDA file
// compiles to PTX wherever clang has the NVPTX target, without CUDA. Nothing runs.
#pragma once
#include <__clang_cuda_builtin_vars.h>  // threadIdx, blockIdx: part of clang

#define __device__ __attribute__((__device__))  // underlined: shim_cuda.h makes `device` a word of Metal
#define __shared__ __attribute__((__shared__))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads, blocks) __attribute__((launch_bounds(threads, blocks)))

typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef unsigned int uint2 __attribute__((ext_vector_type(2)));
typedef unsigned short ushort2 __attribute__((ext_vector_type(2)));
typedef unsigned char uchar4 __attribute__((ext_vector_type(4)));
typedef unsigned int uint4 __attribute__((ext_vector_type(4)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));

// Conversions by the instructions that compute capability 8 and later has.
struct __half {
  unsigned short bits;
  __half() = default;
  __device__ explicit __half(float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
  __device__ operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __device__ explicit __nv_bfloat16(float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
  __device__ operator float() const { return __builtin_bit_cast(float, (unsigned int)bits << 16); }
};

__device__ inline float __shfl_xor_sync(unsigned int lanes, float value, int distance) {
  return __nvvm_shfl_sync_bfly_f32(lanes, value, distance, 31);
}
__device__ inline unsigned int __shfl_up_sync(unsigned int lanes, unsigned int value, int distance) {
  return __nvvm_shfl_sync_up_i32(lanes, value, distance, 0);
}
__device__ inline unsigned int __shfl_sync(unsigned int lanes, unsigned int value, int lane) {
  return __nvvm_shfl_sync_idx_i32(lanes, value, lane, 31);
}
__device__ inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__device__ inline float rsqrt(float a) { return 1.0f / __builtin_sqrtf(a); }
__device__ inline float rint(float a) { return __builtin_rintf(a); }
__device__ inline float fabs(float a) { return __builtin_fabsf(a); }
__device__ inline unsigned int min(unsigned int a, unsigned int b) { return a < b ? a : b; }
__device__ inline int min(int a, int b) { return a < b ? a : b; }
__device__ inline unsigned long __cvta_generic_to_shared(const void* at) {
  return (unsigned long)(__attribute__((address_space(3))) const void*)at;
}
