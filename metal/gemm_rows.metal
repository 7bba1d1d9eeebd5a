// y = x @ W.T for 33 and more rows of x by the GPU's matrix unit: a threadgroup unpacks each weight once, as T, into
// threadgroup memory, where all its simdgroups take it from.
// Used on CUDA where matrix_rows.metal, whose simdgroups unpack into registers, would unpack a weight again for
// every few rows. Inactive channels of a row are zeros; all weights are read. x of 16 bits only.
//
// Arrays: those of sparse_rows.metal, with P = 1.
// Constants
//   T, S, BITS, GROUP, PER_CHANNEL, HAS_BIAS, COUNTS, HALF, PAIRED  as in matrix_rows.metal; P = 1
//   TOKENS  rows of x in one threadgroup
//   TILE    outputs of one threadgroup
//   SPAN    channels in threadgroup memory at one time, in one of two buffers: 32 or 64
//   SIMD_TOKENS, SIMD_OUTPUTS  of one simdgroup: multiples of 16, and of 16, 32 or 64
//   AHEAD   1 or 2: spans by which a lane loads codes before it unpacks them; x, which the cache has, by one
//   OUTPUTS 16 or 32, of one channel, that a lane unpacks: THREADS lanes unpack TILE * SPAN weights
// Grid: (tiles * tiles of TOKENS rows, stripes) threadgroups of THREADS. Those that share weights lie side by side.
//
// A lane loads its codes and its part of x into registers, a span or two ahead; stores the next span's weights and x
// into the buffer that nobody reads; and multiplies from the other one. One barrier a span is enough.
//
// Threadgroup memory holds units of 16 bytes: eight outputs of a channel, or eight channels of a row. load_tiles
// hands a simdgroup four tiles of 8 x 8 from 32 units, and multiply_tile takes tiles as it is described in
// matrix_rows.metal. A unit's place is mixed with the number of its channel or row, so that eight lanes that store or
// load at one time meet eight different groups of banks.

enum : int {
  SHARERS = TILE / OUTPUTS,        // lanes of a channel: 4 or 8
  UNITS = TILE / 8,                // of a channel
  OWN_UNITS = OUTPUTS / 8,         // of a channel, that a lane stores
  X_UNITS = SPAN / 8,              // of a row
  X_OWN = TOKENS * X_UNITS / THREADS,
  ACROSS = TILE / SIMD_OUTPUTS,    // simdgroups side by side
  PARTS = SIMD_OUTPUTS / 16,       // tiles of 16 outputs
  COLUMNS = SIMD_TOKENS / 8,       // tiles of 8 rows
  // The two weights of a word are APART outputs apart, so that their codes lie in one word, 16 bits apart.
  APART = 16 % BITS == 0 ? 16 / BITS : 4,
  MANTISSA = HALF ? 10 : 7,        // bits of T
  ONE = HALF ? 0x3C00 : 0x3F80,    // 1 as T
  POWER = HALF ? 0x6400 : 0x4300,  // 2^MANTISSA as T, whose last bit is 1
  EXPONENT = 1 << MANTISSA,        // halves a T when it is taken from its bits
  PAIR = 0x10001
};

struct GemmMemory {
  uint4 w_list[2 * SPAN * UNITS];
  uint4 x_list[2 * TOKENS * X_UNITS];
};

// What a lane reads of one span: OUTPUTS weights of a channel, and units of x.
struct GemmWeights {
  LaneCodes codes;
  S scale, bias;
};
struct GemmX {
  uint4 at[X_OWN];
};

// Where a unit of a row lies.
METAL_FUNC uint x_place(uint row, uint unit) {
  return row * X_UNITS + (unit ^ (X_UNITS == 8 ? row % 8 : row / 2 % 4));
}

// The output, of a tile, of an entry of the tile's units: lanes' units lie in turns, entries are pairs.
METAL_FUNC uint output_of(uint unit, uint entry) {
  const uint pair = unit / SHARERS * 4 + entry / 2;
  return unit % SHARERS * OUTPUTS + pair / APART * (2 * APART) + pair % APART + entry % 2 * APART;
}

METAL_FUNC float gemm_code(const LaneCodes codes, int c) {
  const uint bits = masked_or(bits_from(codes, c * BITS), (1u << BITS) - 1u, 0x4B000000u);
  return as_type<float>(bits) - 8388608.0f;  // 2^23 + code, less 2^23
}

// A pair of weights as T: code * scale + bias, rounded once. scales, biases: the same T in both halves.
METAL_FUNC uint gemm_pair(const LaneCodes codes, int pair, float scale, float bias, uint scales, uint biases) {
  const int low = pair / APART * (2 * APART) + pair % APART;
  if (!PAIRED) {
    const float first = fma(gemm_code(codes, low), scale, bias);
    return pack_pair<T>(first, fma(gemm_code(codes, low + APART), scale, bias));
  }
  // Both codes in the halves of a word, `up` bits up, under the exponent of 2^MANTISSA: 2^MANTISSA + code * 2^up.
  const int start = 16 % BITS == 0 ? pair % APART * BITS : 0;
  const int down = start + BITS <= MANTISSA ? 0 : start % 8 + BITS <= MANTISSA ? start / 8 * 8 : start;
  const int up = start - down;
  const uint both = 16 % BITS == 0
                        ? codes.word[16 % BITS == 0 ? pair / APART : 0] >> down
                        : (bits_from(codes, low * BITS) & 0xFFFFu) | bits_from(codes, (low + APART) * BITS) << 16;
  const uint raised = masked_or(both, (((1u << BITS) - 1u) << up) * PAIR, POWER * PAIR);
  // Times 2^-up, less 2^(MANTISSA - up): the code, exactly.
  const uint code = pair_fma<T>(raised, uint(ONE - up * EXPONENT) * PAIR, uint(0x8000 + POWER - up * EXPONENT) * PAIR);
  return pair_fma<T>(code, scales, biases);
}

// The part of a launch that a lane reads, and where it stores that in the first buffer.
struct GemmLane {
  const device uint32_t* codes;  // of channel 0, as are
  const device S* scale;
  const device S* bias;
  const device T* x;  // of the threadgroup's first row
  const device float* thresholds;
  uint words, groups;        // of one chunk
  uint output;               // the first in the band
  uint share, channel;       // of the span
  uint row, unit;            // of x, the first of X_OWN
  uint tokens, inputs, last;  // rows, channels, and where the stripe ends
  float threshold;
};

// A lane's weights of the span that begins at channel `first`. Past the stripe's end those of its last channel.
METAL_FUNC GemmWeights read_weights(const GemmLane my, uint first) {
  GemmWeights read;
  const uint k = min(first + my.channel, my.last - 1);
  read.codes = lane_codes(strides_behind(my.codes, k, my.words * 4), my.output, my.words);
  read.scale = *strides_behind(my.scale, k, my.groups * sizeof(S));
  read.bias = *strides_behind(my.bias, k, my.groups * sizeof(S));
  return read;
}

// A lane's part of x in that span, zero past the stripe's end. WHOLE: units are copied, else they are masked as well.
template <bool WHOLE>
METAL_FUNC GemmX read_x(const GemmLane my, uint first) {
  GemmX read = {};
  const uint k = first + 8 * my.unit;
#pragma unroll
  for (int i = 0; i < X_OWN; ++i) {
    const uint t = my.row + i * (THREADS / X_UNITS);
    const device T* row = my.x + ulong(min(t, my.tokens - 1)) * my.inputs;
    const uint last = t < my.tokens ? my.last : 0;
    if (WHOLE) {
      if (k < last) {
        read.at[i] = *(const device uint4*)(row + k);
      }
    } else {
#pragma unroll 1
      for (uint two = 0; two < 8; two += 2) {
        read.at[i].x = read.at[i].y;
        read.at[i].y = read.at[i].z;
        read.at[i].z = read.at[i].w;
        read.at[i].w = masked_two(row, my.thresholds, k + two, last);
      }
    }
  }
  return read;
}

METAL_FUNC void store_weights(const GemmLane my, const GemmWeights read, uint buffer,
                              threadgroup GemmMemory& memory) {
  const uint scales = PAIRED ? halves(read.scale, read.scale) : 0;
  const uint biases = PAIRED ? halves(read.bias, read.bias) : 0;
#pragma unroll
  for (int unit = 0; unit < OWN_UNITS; ++unit) {
    uint4 eight;
    eight.x = gemm_pair(read.codes, 4 * unit, float(read.scale), float(read.bias), scales, biases);
    eight.y = gemm_pair(read.codes, 4 * unit + 1, float(read.scale), float(read.bias), scales, biases);
    eight.z = gemm_pair(read.codes, 4 * unit + 2, float(read.scale), float(read.bias), scales, biases);
    eight.w = gemm_pair(read.codes, 4 * unit + 3, float(read.scale), float(read.bias), scales, biases);
    const uint at = (unit * SHARERS + my.share) ^ (my.channel % 8);
    memory.w_list[(buffer * SPAN + my.channel) * UNITS + at] = eight;
  }
}

template <bool WHOLE>
METAL_FUNC void store_x(const GemmLane my, const GemmX read, uint buffer, threadgroup GemmMemory& memory) {
#pragma unroll
  for (int i = 0; i < X_OWN; ++i) {
    uint4 eight = read.at[i];
    if (WHOLE && my.threshold > 0.0f) {
      eight.x = masked_pair(eight.x, my.threshold);
      eight.y = masked_pair(eight.y, my.threshold);
      eight.z = masked_pair(eight.z, my.threshold);
      eight.w = masked_pair(eight.w, my.threshold);
    }
    const uint row = my.row + i * (THREADS / X_UNITS);
    memory.x_list[buffer * (TOKENS * X_UNITS) + x_place(row, my.unit)] = eight;
  }
}

struct GemmSums {
  float4 at[PARTS][COLUMNS];
};

// The products of all spans from channel `first` on.
template <bool WHOLE>
METAL_FUNC GemmSums multiply_spans(const GemmLane my, uint first, threadgroup GemmMemory& memory, const Thread me) {
  // The units that this lane names to load_tiles: of a tile of 16 channels by 16 outputs, and of 16 rows by 16
  // channels, each four of 8 x 8.
  const uint place = me.simdgroup % ACROSS, turn = me.simdgroup / ACROSS;
  const uint eighth = me.in_simdgroup % 8, second = me.in_simdgroup / 8 % 2, fourth = me.in_simdgroup / 16;
  const uint w_row = (eighth + 8 * fourth) * UNITS;
  const uint w_unit = (place * (SIMD_OUTPUTS / 8) + second) ^ eighth;
  const uint x_unit = x_place(turn * SIMD_TOKENS + eighth + 8 * fourth, second);

  GemmSums sums = {};
  store_weights(my, read_weights(my, first), 0, memory);
  store_x<WHOLE>(my, read_x<WHOLE>(my, first), 0, memory);
  GemmWeights next = read_weights(my, first + SPAN), after = next;
  if (AHEAD == 2) {
    after = read_weights(my, first + 2 * SPAN);
  }
  GemmX next_x = read_x<WHOLE>(my, first + SPAN);
  uint buffer = 0;
#pragma unroll 2
  for (uint stage = first; stage < my.last; stage += SPAN) {  // twice, so that buffers are constants
    threadgroup_barrier(mem_flags::mem_threadgroup);  // this buffer is written, and nobody reads the other
    if (stage + SPAN < my.last) {
      store_weights(my, next, 1 - buffer, memory);
      store_x<WHOLE>(my, next_x, 1 - buffer, memory);
      next = after;
      after = read_weights(my, stage + (AHEAD + 1) * SPAN);
      if (AHEAD == 1) {
        next = after;
      }
      next_x = read_x<WHOLE>(my, stage + 2 * SPAN);
    }
    const uint w_buffer = buffer * (SPAN * UNITS) + w_row;
    const uint x_buffer = buffer * (TOKENS * X_UNITS);
#pragma unroll
    for (int step = 0; step < SPAN / 16; ++step) {
      uint4 columns[COLUMNS / 2];
#pragma unroll
      for (int two = 0; two < COLUMNS / 2; ++two) {
        const uint at = x_buffer + 16 * two * X_UNITS + (x_unit ^ (2 * step));
        columns[two] = load_tiles<false>(&memory.x_list[at]);
      }
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const uint at = w_buffer + 16 * step * UNITS + (w_unit ^ (2 * part));
        const uint4 a = load_tiles<true>(&memory.w_list[at]);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          uint2 b;
          b.x = j % 2 == 0 ? columns[j / 2].x : columns[j / 2].z;
          b.y = j % 2 == 0 ? columns[j / 2].y : columns[j / 2].w;
          sums.at[part][j] = multiply_tile<T>(a, b, sums.at[part][j]);
        }
      }
    }
    buffer = 1 - buffer;
  }
  return sums;
}

template <bool PARTIAL, typename Y>
METAL_FUNC void multiply_gemm(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                              uint rows, device Y* y, device uint32_t* counts, uint first_token, uint tile,
                              threadgroup GemmMemory& memory, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, 0);
  const uint inputs = launch.inputs;
  const uint stripe_first = min(me.threadgroup_y * launch.stripe, inputs);
  const uint stripe_last = min(stripe_first + launch.stripe, inputs);
  const uint tokens = min(rows - first_token, uint(TOKENS));
  const device float* thresholds = thresholds_of(settings, P);
  const device float* bias = thresholds + (PER_CHANNEL ? P * inputs : P);
  const uint band = own.band;
  const uint band_index = tile / own.tiles;
  const uint tile_first = (tile - band_index * own.tiles) * TILE;  // in the band
  const ulong chunks_before = ulong(band_index) * inputs;

  GemmLane my;
  my.share = me.index % SHARERS;
  // Four sharers: neighbours take channels 4 apart, which lie in other banks.
  my.channel = SHARERS == 4 ? me.simdgroup * 8 + me.in_simdgroup / 4 % 2 * 4 + me.in_simdgroup / 8 : me.index / SHARERS;
  my.row = me.index / X_UNITS;
  my.unit = me.index % X_UNITS;
  // Who owns nothing of the band reads what is there.
  my.output = tile_first + my.share * OUTPUTS < band ? tile_first + my.share * OUTPUTS : 0;
  my.words = band / 32 * BITS;
  my.groups = band / GROUP;
  const ulong groups_before = chunks_before * my.groups + my.output / GROUP;
  my.codes = packed + own.weight + chunks_before * my.words;
  my.scale = (const device S*)(packed + own.scales) + groups_before;
  my.bias = (const device S*)(packed + own.biases) + groups_before;
  my.x = x + ulong(first_token) * inputs;
  my.thresholds = thresholds;
  my.tokens = tokens;
  my.inputs = inputs;
  my.last = stripe_last;
  my.threshold = thresholds[0];

  const bool whole = !PER_CHANNEL && inputs % 8 == 0 && launch.stripe % 8 == 0 && (ulong)x % 16 == 0;
  const GemmSums sums = whole ? multiply_spans<true>(my, stripe_first, memory, me)
                              : multiply_spans<false>(my, stripe_first, memory, me);

  const uint place = me.simdgroup % ACROSS, turn = me.simdgroup / ACROSS;
  const uint group_lane = me.in_simdgroup / 4, quarter = me.in_simdgroup % 4;
#pragma unroll
  for (int unit = 0; unit < 2 * PARTS; ++unit) {
    const uint in_tile = output_of(place * (SIMD_OUTPUTS / 8) + unit, group_lane);
    const uint at = band_index * band + tile_first + in_tile;
    const bool owns = tile_first + in_tile < band && at < own.outputs;
    const float more = HAS_BIAS && !PARTIAL && owns ? bias[at] : 0.0f;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const float4 four = sums.at[unit / 2][j];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint t = turn * SIMD_TOKENS + 8 * j + 2 * quarter + odd;
        const float sum = unit % 2 == 0 ? (odd == 0 ? four.x : four.y) : (odd == 0 ? four.z : four.w);
        if (t < tokens && PARTIAL) {
          y[ulong(t) * launch.positions + in_tile] = Y(sum);
        } else if (t < tokens && owns) {
          y[ulong(first_token + t) * own.outputs + at] = Y(HAS_BIAS ? sum + more : sum);
        }
      }
    }
  }

  count_rows(my.x, thresholds, inputs, stripe_first, stripe_last, tokens, counts + (PARTIAL ? 0 : first_token),
             PARTIAL ? launch.positions : 1, PARTIAL ? COUNTS : 1, tile, (launch.positions - COUNTS) / TILE, me);
}

// K in one stripe.
METAL_FUNC void gemm_rows(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                          uint rows, device T* y, device uint32_t* active, uint tile, uint first_token,
                          threadgroup GemmMemory& memory, const Thread me) {
  multiply_gemm<false>(x, settings, packed, rows, y, active, first_token, tile, memory, me);
}

// K in several stripes.
METAL_FUNC void gemm_rows_stripe(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                                 uint rows, device float* partials, uint tile, uint first_token,
                                 threadgroup GemmMemory& memory, const Thread me) {
  const uint positions = launch_of(settings).positions;
  device float* sums = partials + (ulong(me.threadgroup_y) * rows + first_token) * positions;
  device uint32_t* counts = (device uint32_t*)(sums + positions - COUNTS);
  multiply_gemm<true>(x, settings, packed, rows, sums + tile * TILE, counts, first_token, tile, memory, me);
}
