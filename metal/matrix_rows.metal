// y = x @ W.T for many rows of x by the GPU's matrix unit: weights become T in registers, as they are read. Inactive
// channels of a row are zeros; all weights are read.
// Used on CUDA for prompts, and for batches of many rows, below the size from which it pays to dequantize the whole
// matrix. Metal has no use for it: its matrix instructions up to the M4 multiply no faster than its lanes do, and
// the M5's are reached by MLX's own matmul alone. x of 16 bits only.
//
// Arrays: those of sparse_rows.metal, with P = 1.
// Constants
//   T, S, BITS, GROUP, PER_CHANNEL, HAS_BIAS, COUNTS  as there; P = 1
//   TOKENS   rows of x in one threadgroup, a multiple of 8
//   OUTPUTS  8, 16 or 32, of one lane: of one group. A simdgroup has 8 * OUTPUTS side by side
//   DEPTH    simdgroups with the same outputs, which take turns at the channels; a tile is THREADS / 32 / DEPTH
//            simdgroups wide
//   SPAN     channels of x in threadgroup memory at one time, a multiple of 64 and of 16 * UNROLL * DEPTH
//   HALF, PAIRED  1 if T is float16_t; 1 if codes and scales are T's own: S is T, and T holds codes exactly
//   UNROLL   steps of 16 channels whose weights a lane loads while it multiplies those before
// Grid: (tiles * tiles of TOKENS rows, stripes) threadgroups of THREADS. Those that share weights lie side by side.
//
// multiply_tile(a, b, c) is a 16 x 8 tile c += a b over 16 channels, held by a simdgroup. Lane 4 g + q has of a rows g
// and g + 8, of b column g, of both channels 2 q, 2 q + 1, 2 q + 8, 2 q + 9; of c rows g, g + 8 and columns 2 q,
// 2 q + 1. Here rows of a are outputs, columns of b rows of x. Which ones is free: a lane's own outputs fill rows g
// and g + 8 of OUTPUTS / 2 tiles, and its channels are the neighbours 4 q to 4 q + 3, so that nothing is moved
// between lanes.

enum : int {
  WIDTH = THREADS / 32 / DEPTH,  // simdgroups side by side
  TILE = WIDTH * 8 * OUTPUTS,
  PARTS = OUTPUTS / 2,      // tiles of 16 outputs
  COLUMNS = TOKENS / 8,     // tiles of 8 rows of x
  STRIDE = SPAN / 4 + 4,    // so that eight rows of x lie in banks of their own
  AHEAD = 16 * UNROLL,      // channels of one step
  SLICE = 4,                // tiles of c that are added over DEPTH at one time
  ADDED = DEPTH > 1 ? (DEPTH - 1) * WIDTH * 32 * SLICE : 1,
  FOURS = TOKENS * SPAN / 4,  // of channels, in threadgroup memory
  FILL = FOURS < 8 * THREADS ? FOURS / THREADS : 8  // that a lane loads before it stores the first
};

struct MatrixMemory {
  uint2 x_list[TOKENS * STRIDE];  // four channels of a row each
  float4 sum_list[ADDED];
};

// Of one group of a channel.
struct Grid {
  S scale, bias;
};

METAL_FUNC float code_at(const LaneCodes codes, int c) {
  const uint bits = masked_or(bits_from(codes, c * BITS), (1u << BITS) - 1u, 0x4B000000u);
  return as_type<float>(bits) - 8388608.0f;  // 2^23 + code, less 2^23
}

// The weights of an output at two channels, as T: code * scale + bias, rounded once.
METAL_FUNC uint weight_pair(const LaneCodes low, const LaneCodes high, int c, const Grid at_low, const Grid at_high) {
  if (!PAIRED) {
    const float first = fma(code_at(low, c), float(at_low.scale), float(at_low.bias));
    return pack_pair<T>(first, fma(code_at(high, c), float(at_high.scale), float(at_high.bias)));
  }
  // Codes of both channels in the halves of a word, each with the exponent of 2^10 or 2^7: that of T's last bit.
  constexpr uint MASK = (1u << BITS) - 1u;
  constexpr uint POWER = HALF ? 0x64006400u : 0x43004300u;
  constexpr uint LESS_POWER = HALF ? 0xE400E400u : 0xC300C300u;
  constexpr uint ONE = HALF ? 0x3C003C00u : 0x3F803F80u;
  const int start = c * BITS;
  const int window = start % 16 + BITS <= 16 ? start / 16 * 16 : start / 8 * 8;
  const uint both = (bits_from(low, window) & 0xFFFFu) | bits_from(high, window) << 16;
  const uint codes = pair_fma<T>(masked_or(both >> (start - window), MASK * 0x10001u, POWER), ONE, LESS_POWER);
  return pair_fma<T>(codes, halves(at_low.scale, at_high.scale), halves(at_low.bias, at_high.bias));
}

// What a lane reads for one step.
struct Ahead {
  LaneCodes word[UNROLL][4];
  Grid grid[UNROLL][4];
};

// codes, scale, offset: of channel 0; k: the lane's first channel. Past the end: the last channel again.
METAL_FUNC Ahead read_ahead(const device uint32_t* codes, const device S* scale, const device S* offset, uint output,
                            uint words, uint groups, uint k, uint last) {
  Ahead read;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint here = min(k + 16 * u + i, last);
      read.word[u][i] = lane_codes(strides_behind(codes, here, words * 4), output, words);
      read.grid[u][i].scale = *strides_behind(scale, here, groups * sizeof(S));
      read.grid[u][i].bias = *strides_behind(offset, here, groups * sizeof(S));
    }
  }
  return read;
}

template <bool PARTIAL, typename Y>
METAL_FUNC void multiply_matrix(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                                uint rows, device Y* y, device uint32_t* counts, uint first_token, uint tile,
                                threadgroup MatrixMemory& memory, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, 0);
  const uint lane = me.index;
  const uint inputs = launch.inputs;
  const uint stripe_first = min(me.threadgroup_y * launch.stripe, inputs);
  const uint stripe_last = min(stripe_first + launch.stripe, inputs);
  const uint tokens = min(rows - first_token, uint(TOKENS));
  const device T* mine = x + ulong(first_token) * inputs;

  const uint band = own.band;
  const uint band_index = tile / own.tiles;
  const uint tile_first = (tile - band_index * own.tiles) * TILE;  // in the band
  const uint group_lane = me.in_simdgroup / 4, quarter = me.in_simdgroup % 4;
  const uint place = me.simdgroup % WIDTH, turn = me.simdgroup / WIDTH;
  const uint in_tile = (place * 8 + group_lane) * OUTPUTS;
  const bool owns = tile_first + in_tile < band;
  const uint output = owns ? tile_first + in_tile : 0;  // who owns nothing reads what is there, and stores nothing
  const uint words = band / 32 * BITS;                  // of one chunk
  const uint groups = band / GROUP;
  const ulong chunks_before = ulong(band_index) * inputs;
  const device uint32_t* codes = packed + own.weight + chunks_before * words;
  const device S* scale = (const device S*)(packed + own.scales) + chunks_before * groups + output / GROUP;
  const device S* offset = (const device S*)(packed + own.biases) + chunks_before * groups + output / GROUP;
  const device float* thresholds = thresholds_of(settings, P);
  const device float* bias = thresholds + (PER_CHANNEL ? P * inputs : P);

  float4 sums[PARTS][COLUMNS] = {};
  const uint first_k = stripe_first + turn * AHEAD + 4 * quarter;
  Ahead next = read_ahead(codes, scale, offset, output, words, groups, first_k, stripe_last - 1);
  // Words of x can be copied.
  const bool whole = !PER_CHANNEL && inputs % 4 == 0 && launch.stripe % 4 == 0 && (ulong)x % 8 == 0;
  for (uint stage = stripe_first; stage < stripe_last; stage += SPAN) {
    for (uint fill = lane; fill < uint(FOURS); fill += FILL * THREADS) {
      uint2 four[FILL] = {};
      if (whole) {
#pragma unroll
        for (int i = 0; i < FILL; ++i) {
          const uint t = (fill + i * THREADS) / (SPAN / 4), k = stage + (fill + i * THREADS) % (SPAN / 4) * 4;
          if (t < tokens && k < stripe_last) {
            four[i] = *(const device uint2*)(mine + ulong(t) * inputs + k);
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < FILL; ++i) {
          const uint t = (fill + i * THREADS) / (SPAN / 4), k = stage + (fill + i * THREADS) % (SPAN / 4) * 4;
          const device T* row = mine + ulong(min(t, tokens - 1)) * inputs;
          four[i].x = masked_two(row, thresholds, k, t < tokens ? stripe_last : 0);
          four[i].y = masked_two(row, thresholds, k + 2, t < tokens ? stripe_last : 0);
        }
      }
      if (!PER_CHANNEL && whole && has_mask(thresholds)) {
#pragma unroll
        for (int i = 0; i < FILL; ++i) {
          four[i].x = masked_pair(four[i].x, thresholds[0]);
          four[i].y = masked_pair(four[i].y, thresholds[0]);
        }
      }
#pragma unroll
      for (int i = 0; i < FILL; ++i) {
        const uint at = fill + i * THREADS;
        memory.x_list[at / (SPAN / 4) * STRIDE + at % (SPAN / 4)] = four[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint last = min(uint(SPAN), stripe_last - stage);
    for (uint first = turn * AHEAD; first < last; first += AHEAD * DEPTH) {
      const Ahead here = next;
      const uint k = stage + first + AHEAD * DEPTH + 4 * quarter;
      next = read_ahead(codes, scale, offset, output, words, groups, k, stripe_last - 1);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        uint2 columns[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          columns[j] = memory.x_list[(8 * j + group_lane) * STRIDE + (first / 4 + 4 * u) + quarter];
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const int c = 2 * part;
          uint4 a;
          a.x = weight_pair(here.word[u][0], here.word[u][1], c, here.grid[u][0], here.grid[u][1]);
          a.y = weight_pair(here.word[u][0], here.word[u][1], c + 1, here.grid[u][0], here.grid[u][1]);
          a.z = weight_pair(here.word[u][2], here.word[u][3], c, here.grid[u][2], here.grid[u][3]);
          a.w = weight_pair(here.word[u][2], here.word[u][3], c + 1, here.grid[u][2], here.grid[u][3]);
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) {
            sums[part][j] = multiply_tile<T>(a, columns[j], sums[part][j]);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next stage is written
  }

  // The first of the simdgroups with the same outputs adds the others' sums to its own.
  if (DEPTH > 1) {
#pragma unroll
    for (int slice = 0; slice < PARTS * COLUMNS; slice += SLICE) {
      if (turn > 0) {
#pragma unroll
        for (int i = 0; i < SLICE; ++i) {
          const uint at = ((turn - 1) * WIDTH + place) * SLICE + i;
          memory.sum_list[at * 32 + me.in_simdgroup] = sums[(slice + i) / COLUMNS][(slice + i) % COLUMNS];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (turn == 0) {
#pragma unroll
        for (int i = 0; i < SLICE; ++i) {
          float4 sum = sums[(slice + i) / COLUMNS][(slice + i) % COLUMNS];
#pragma unroll
          for (int other = 0; other < DEPTH - 1; ++other) {
            const float4 more = memory.sum_list[((other * WIDTH + place) * SLICE + i) * 32 + me.in_simdgroup];
            sum.x += more.x;
            sum.y += more.y;
            sum.z += more.z;
            sum.w += more.w;
          }
          sums[(slice + i) / COLUMNS][(slice + i) % COLUMNS] = sum;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next slice is written
    }
  }

#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const uint t = 8 * j + 2 * quarter + second;
      if (t < tokens && turn == 0) {
#pragma unroll
        for (int fourth = 0; fourth < OUTPUTS / 4; ++fourth) {
          float4 four;
          four.x = second == 0 ? sums[2 * fourth][j].x : sums[2 * fourth][j].y;
          four.y = second == 0 ? sums[2 * fourth][j].z : sums[2 * fourth][j].w;
          four.z = second == 0 ? sums[2 * fourth + 1][j].x : sums[2 * fourth + 1][j].y;
          four.w = second == 0 ? sums[2 * fourth + 1][j].z : sums[2 * fourth + 1][j].w;
          const uint c = in_tile + 4 * fourth;
          if (PARTIAL) {
            *(device float4*)(y + ulong(t) * launch.positions + c) = four;
          } else if (owns) {
            const uint at = band_index * band + tile_first + c;
            device Y* to = y + ulong(first_token + t) * own.outputs + at;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float sum = i < 2 ? (i == 0 ? four.x : four.y) : (i == 2 ? four.z : four.w);
              if (at + i < own.outputs) {
                to[i] = Y(HAS_BIAS ? sum + bias[at + i] : sum);
              }
            }
          }
        }
      }
    }
  }

  count_rows(mine, thresholds, inputs, stripe_first, stripe_last, tokens, counts + (PARTIAL ? 0 : first_token),
             PARTIAL ? launch.positions : 1, PARTIAL ? COUNTS : 1, tile, (launch.positions - COUNTS) / TILE, me);
}

// K in one stripe.
METAL_FUNC void matrix_rows(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                            uint rows, device T* y, device uint32_t* active, uint tile, uint first_token,
                            threadgroup MatrixMemory& memory, const Thread me) {
  multiply_matrix<false>(x, settings, packed, rows, y, active, first_token, tile, memory, me);
}

// K in several stripes.
METAL_FUNC void matrix_rows_stripe(const device T* x, const device uint32_t* settings,
                                   const device uint32_t* packed, uint rows, device float* partials, uint tile,
                                   uint first_token, threadgroup MatrixMemory& memory, const Thread me) {
  const uint positions = launch_of(settings).positions;
  device float* sums = partials + (ulong(me.threadgroup_y) * rows + first_token) * positions;
  device uint32_t* counts = (device uint32_t*)(sums + positions - COUNTS);
  device float* at = sums + tile * TILE;
  multiply_matrix<true>(x, settings, packed, rows, at, counts, first_token, tile, memory, me);
}
