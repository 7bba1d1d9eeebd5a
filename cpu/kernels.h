// What the kernels compute, as plain structs: one table of functions per instruction set.
//
// It knows nothing of MLX and nothing of threads: a kernel does one task of a larger job.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum Type : int { FLOAT32, FLOAT16, BFLOAT16 };

constexpr int BLOCK = 16;    // active channels multiplied together; the next block is prefetched meanwhile
constexpr int TILE = 2048;   // outputs of one task at most: chunks of 1 KB at 4 bits, accumulators in L1
constexpr int PADDING = 16;  // floats: the widest vector

// `groups` groups of one band of a Zigzag matrix, all input channels.
struct Tile {
  const uint8_t* codes;    // chunk of channel 0
  size_t code_stride;      // bytes from one channel to the next
  const void* scales;      // groups of channel 0; w = code * scale + bias
  const void* biases;
  size_t scale_stride;     // elements from one channel to the next
  Type type;               // of scales and biases
  int groups, group_size, bits;
};

struct Active {
  const int32_t* channel;  // (count,), rising
  const float* x;          // (count,)
  int count;
};

// x as it lies in memory, and what decides which channels are skipped.
struct Input {
  const void* x;
  Type type;
  int64_t stride;          // elements
  int inputs;
  const float* threshold;  // nullptr: every channel is active
  int64_t threshold_stride;  // 0 where one threshold serves all channels
};

// Where the sums of a tile go.
struct Output {
  void* y;
  Type type;
  int outputs;       // of this tile, without the band's padding
  const void* bias;  // the layer's bias or nullptr
  Type bias_type;
};

// Floats of one partial result: sums in the order of unpacking, then sums of x * bias by group.
constexpr size_t partial_sums(int groups, int group_size) {
  return ((size_t)groups * group_size + 255) / 256 * 256;  // 256: the widest column of outputs
}
constexpr size_t partial_size(int groups, int group_size) {
  return partial_sums(groups, group_size) + ((size_t)groups + PADDING - 1) / PADDING * PADDING;
}

struct Kernels {
  const char* name;
  // Lists the active channels; returns their number. channel, x: room for `inputs`.
  int (*collect)(const Input&, int32_t* channel, float* x);
  // partial: the sums over `Active`, in the kernel's own order.
  void (*gemv)(const Tile&, const Active&, float* partial);
  // y from `stripes` partial results that lie partial_size apart.
  void (*finish)(const Tile&, const float* partials, int stripes, const Output&);
};

// The best table for this machine, or the one chosen by use_isa.
const Kernels& kernels();
// Chooses a table by name; false if this machine or build lacks it.
bool use_isa(const char* name);
