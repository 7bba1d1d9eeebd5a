// The Metal words that the kernel bodies use, spelled in CUDA. Included after CUDA's own headers.
#pragma once
#define device
#define constant
#define threadgroup  // of a reference; variables are declared __shared__, by kernel_text.py
#define METAL_FUNC __device__ __forceinline__
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)

// MLX writes the kernel's head, so the block's size, and how many an SM is to hold, are added to the word
// itself: both cap registers.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(SPQT_THREADS, SPQT_BLOCKS)

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long long ulong;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

namespace mem_flags {
constexpr int mem_threadgroup = 0;
}

__device__ inline void threadgroup_barrier(int) { __syncthreads(); }

template <typename To, typename From>
__device__ inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the bits");
  return *reinterpret_cast<To*>(&from);
}

// Blocks are whole warps, and the bodies call these with all lanes present.
__device__ inline float simd_shuffle_xor(float value, ushort mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

__device__ inline uint simd_prefix_exclusive_sum(uint value) {
  uint sum = value;
  for (uint distance = 1; distance < 32; distance *= 2) {
    const uint below = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
    sum += thread_index_in_simdgroup >= distance ? below : 0;
  }
  return sum - value;
}

__device__ inline uint simd_broadcast(uint value, ushort lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

// The words of matrix_rows.metal and gemm_rows.metal, from compute capability 8.0 on. Two numbers as T in one word,
// the first low.
template <typename T>
__device__ inline uint pack_pair(float low, float high);
template <>
__device__ inline uint pack_pair<float16_t>(float low, float high) {
  uint pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ inline uint pack_pair<bfloat16_t>(float low, float high) {
  uint pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// a * b + c of both halves, which are T.
template <typename T>
__device__ inline uint pair_fma(uint a, uint b, uint c);
template <>
__device__ inline uint pair_fma<float16_t>(uint a, uint b, uint c) {
  uint sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
template <>
__device__ inline uint pair_fma<bfloat16_t>(uint a, uint b, uint c) {
  uint sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// (word & mask) | bits, one instruction: the compiler makes two of it.
__device__ inline uint masked_or(uint word, uint mask, uint bits) {
  uint result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

#define SPQT_MULTIPLY_TILE(type)                                                                              \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                  \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                  \
      : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)                                                            \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y))
template <typename T>
__device__ inline float4 multiply_tile(uint4 a, uint2 b, float4 c);
template <>
__device__ inline float4 multiply_tile<float16_t>(uint4 a, uint2 b, float4 c) {
  SPQT_MULTIPLY_TILE("f16");
  return c;
}
template <>
__device__ inline float4 multiply_tile<bfloat16_t>(uint4 a, uint2 b, float4 c) {
  SPQT_MULTIPLY_TILE("bf16");
  return c;
}

// Four tiles of 8 x 8 numbers of 16 bits, whose rows are the units that lanes 0 to 7, 8 to 15 and so on name. Lane
// 4 g + q gets of each tile row g, columns 2 q and 2 q + 1; TRANSPOSED: column g, rows 2 q and 2 q + 1.
template <bool TRANSPOSED>
__device__ inline uint4 load_tiles(const uint4* unit) {
  const uint at = uint(__cvta_generic_to_shared(unit));
  uint4 tiles;
  if (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles.x), "=r"(tiles.y), "=r"(tiles.z), "=r"(tiles.w)
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles.x), "=r"(tiles.y), "=r"(tiles.z), "=r"(tiles.w)
                 : "r"(at)
                 : "memory");
  }
  return tiles;
}
