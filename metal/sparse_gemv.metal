// y = x @ W.T over the active channels: collects them, then multiplies only their chunks.
// Used for every decode step of a Zigzag layer; q/k/v or gate/up share one launch. With NORMED x is first
// normalized by its root mean square, as mx.fast.rms_norm does it.
//
// Arrays (P projections of one input)
//   x         (inputs,) T
//   settings  settings.h
//   packed    uint32 words of all projections: weight (bands, inputs, band * BITS / 32) uint32; scales and
//             biases (bands, inputs, band / GROUP) S
//   y         with one stripe (outputs,) T of the projection
//   active    with one stripe (P,) uint32: `counted`, what earlier steps met, plus the active channels
//   partials  else (stripes, positions) float32: of each stripe its sums, tile by tile in the order in which
//             the lanes hold them, then COUNTS uint32: its active channels, entry i for projection i % P
// Constants (kernel_text.py writes them in front)
//   T, S         types of x and y; of scales and biases
//   BITS, GROUP  the format
//   P            projections
//   OUTPUTS      outputs of one lane: 32, or 64 where 64 divides every band
//   LANES        lanes side by side on one channel; a tile is LANES * OUTPUTS outputs
//   ROWS         channels in work at one time; THREADS = LANES * ROWS rounded up to whole simdgroups
//   UNROLL       channels a lane loads before it multiplies: bytes in flight
//   LIST         channels collected at one time, a multiple of THREADS, at most 32 THREADS and 65536
//   SLICE        sums per lane that are added over the rows at one time; a power of two
//   DECODE       how a code becomes a float: 0 exponent and subtract, 1 convert, 2 subnormal, 3 subnormal of
//                16 bits, for codes of 2, 4 or 8 bits; others are converted
//   PADDED       1: the list ends in channels times zero, so that all rows take equally many turns; 0: the
//                last turn is clipped
//   PER_CHANNEL, HAS_BIAS, NORMED  0 or 1: what settings holds, and whether x is normalized
// Grid: (tiles of all projections, stripes) threadgroups of THREADS.
//
// A threadgroup owns one tile of outputs and one stripe of channels; a lane owns OUTPUTS outputs of it:
//
//             outputs of a projection, band by band             one threadgroup: ROWS x LANES lanes
//             band 0                band 1
//             tile 0     tile 1     tile 2     tile 3                      lane 0    1    2   LANES-1
//            +----------+----------+----------+----------+                +-------+----+----+----+
//   stripe 0 |  (0, 0)  |  (1, 0)  |  (2, 0)  |  (3, 0)  |        row 0   |OUTPUTS|    |    |    |  channel
//  channels  +----------+----------+----------+----------+                +-------+----+----+----+  list[0]
//   stripe 1 |  (0, 1)  |  (1, 1)  |  (2, 1)  |  (3, 1)  |        row 1   |       |    |    |    |  list[1]
//            +----------+----------+----------+----------+                +-------+----+----+----+
//   stripe 2 |  (0, 2)  |  (1, 2)  |  (2, 2)  |  (3, 2)  |      ROWS - 1  |       |    |    |    |  ...
//            +----------+----------+----------+----------+                +-------+----+----+----+
//            down a column: summed by reduce_stripes.metal       rows: summed at the end; then list[ROWS] ...

enum : int {
  WORDS = OUTPUTS / 32 * BITS,  // of a lane's part of a chunk
  SCALES = OUTPUTS > GROUP ? OUTPUTS / GROUP : 1,
  // Where a simdgroup holds several rows, its lanes trade sums until each holds all rows of HELD outputs.
  NARROW = LANES < 32 && 32 % LANES == 0,
  HELD = NARROW ? OUTPUTS * LANES / 32 : OUTPUTS,
  COLUMNS = NARROW ? 32 : LANES,
  SUMMANDS = NARROW ? THREADS / 32 : ROWS,
  STEP = SLICE < HELD ? SLICE : HELD,  // sums of a lane that pass through threadgroup memory at one time
  WIDTH = STEP * COLUMNS
};

struct GemvMemory {
  // Of each active channel of this pass where its scales begin in the band's, and x there as a float's bits.
  uint2 list[LIST + PADDED * ROWS * UNROLL];
  uint simdgroup_count[THREADS / 32];
  float square_sum[NORMED ? THREADS / 32 : 1];  // every threadgroup needs that of the whole x
  float partial[SUMMANDS * WIDTH];
};

// x of channel k as it is multiplied: with NORMED rounded twice, as mx.fast.rms_norm rounds.
METAL_FUNC T multiplied(const device T* x, const device float* norm, float factor, uint k) {
  return NORMED ? T(norm[k] * float(T(float(x[k]) * factor))) : x[k];
}

// One number of 16 bits of a word.
METAL_FUNC ushort half_of(uint word, bool high) {
  const ushort2 pair = as_type<ushort2>(word);
  return high ? pair.y : pair.x;
}

// The lowest byte of a half.
METAL_FUNC unsigned char byte_of(uint word, bool high) {
  const uchar4 bytes = as_type<uchar4>(word);
  return high ? bytes.z : bytes.x;
}

// One threadgroup's tile and stripe. y: with PARTIAL the place of the tile's sums, else the projection's.
// expert: of several matrices that lie one after another (sparse_experts.metal), which one; else 0.
template <bool PARTIAL, typename Y>
METAL_FUNC void multiply(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                         device Y* y, device uint32_t* counts, uint counted_before, uint expert, uint projection,
                         threadgroup GemvMemory& memory, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, projection);
  const uint lane = me.index;
  const uint inputs = launch.inputs;
  const uint stripe_first = min(me.threadgroup_y * launch.stripe, inputs);
  const uint stripe_last = min(stripe_first + launch.stripe, inputs);

  const uint band = own.band;
  const uint tile_here = me.threadgroup_x - own.first_tile;
  const uint band_index = tile_here / own.tiles;
  const uint tile_first = (tile_here - band_index * own.tiles) * (LANES * OUTPUTS);  // in the band

  const uint row = lane / LANES;
  const uint unit = lane % LANES;  // which outputs of the tile
  const uint output = tile_first + unit * OUTPUTS;
  const uint words = band / 32 * BITS;  // of one chunk
  const uint groups = band / GROUP;
  const uint bands = (own.outputs + band - 1) / band;
  const ulong chunks_before = (ulong(expert) * bands + band_index) * inputs;  // of the bands before
  const device uint32_t* codes = packed + own.weight + chunks_before * words + output / 32 * BITS;
  const device S* scale = (const device S*)(packed + own.scales) + chunks_before * groups + output / GROUP;
  const device S* offset = (const device S*)(packed + own.biases) + chunks_before * groups + output / GROUP;
  const device float* thresholds = thresholds_of(settings, P);
  const uint threshold_count = PER_CHANNEL ? P * inputs : P;
  const device float* bias = thresholds + threshold_count + biases_before(settings, projection);
  const device float* norm = thresholds + threshold_count + (HAS_BIAS ? biases_before(settings, P) : 0);

  // Codes are used where they lie in the word, so output c of a lane holds its sum times 2^shift(c):
  // a code that starts late in its word is taken from a view that begins some bits later.
  constexpr bool PAIRED = 8 % BITS == 0;  // codes lie alike in both halves of a word: one mask serves two
  constexpr int WAY = DECODE == 3 && !PAIRED ? 1 : DECODE;
  constexpr uint MASK = (1u << BITS) - 1u;
  constexpr int ROOM = WAY == 1 ? 32 : 23;  // bits of a word where a code keeps its value
  constexpr int HALF_ROOM = 10;             // of a half, whose lowest bits count 2^-24 as a subnormal number
  constexpr float TWO_TO_23 = 8388608.0f;
  constexpr uint TWO_TO_23_BITS = 0x4B000000u;  // of that float, whose mantissa counts ones
  // x is multiplied by this on its way in, so that subnormal codes times x are in normal range: 2^64, 2^24.
  constexpr float LIFT = WAY == 2 ? 18446744073709551616.0f : WAY == 3 ? 16777216.0f : 1.0f;
  // A code of one times LIFT is one over this: 2^85 = 2^149 / 2^64 where a float's lowest bits count 2^-149.
  constexpr float CODE_ONE = WAY == 2 ? 38685626227668133590597632.0f : 1.0f;
  // Taken off each code: smaller sums, less rounding.
  constexpr uint MIDDLE = WAY == 0 ? 1u << (BITS - 1) : 0;
  // Codes are converted with all below them in their half: fewer masks; undone below.
  constexpr bool UNMASKED_BELOW = WAY == 1 && PAIRED;

  const uint both = launch.both;
  float sums[OUTPUTS] = {};
  float constant_part[SCALES] = {};  // of the biases: the same for all outputs of a group
  uint total = 0;

  float factor = 1.0f;
  if (NORMED) {
    float squares = 0.0f;
    for (uint k = lane; k < inputs; k += THREADS) {
      squares = fma(float(x[k]), float(x[k]), squares);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      squares += simd_shuffle_xor(squares, ushort(distance));
    }
    if (me.in_simdgroup == 0) {
      memory.square_sum[me.simdgroup] = squares;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = 0.0f;
#pragma unroll
    for (uint g = 0; g < uint(THREADS / 32); ++g) {
      squares += memory.square_sum[g];
    }
    factor = rsqrt(squares / float(inputs) + launch.eps);
  }

  for (uint pass = stripe_first; pass < stripe_last; pass += LIST) {
    // Collect. A simdgroup tests neighbouring channels, 32 at a time; any fixed order of the list will do.
    constexpr int EACH = LIST / THREADS;
    const uint tested = pass + me.simdgroup * (EACH * 32) + me.in_simdgroup;
    uint kept = 0;  // bit set over the EACH tests of this lane
    uint mine = 0;
#pragma unroll 4
    for (int e = 0; e < EACH; ++e) {
      const uint k = tested + e * 32;
      if (k < stripe_last) {
        const uint at = PER_CHANNEL ? projection * inputs + k : projection;
        if (!(fabs(float(multiplied(x, norm, factor, k))) < thresholds[at])) {
          kept |= 1u << e;
          mine += 1;
        }
      }
    }
    const uint before = simd_prefix_exclusive_sum(mine);
    if (me.in_simdgroup == 31) {
      memory.simdgroup_count[me.simdgroup] = before + mine;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint count = 0;
    uint at = before;
    uint begins = tested * groups;
#pragma unroll
    for (uint g = 0; g < uint(THREADS / 32); ++g) {
      const uint in_group = memory.simdgroup_count[g];
      at += g < me.simdgroup ? in_group : 0;
      count += in_group;
    }
#pragma unroll 2
    for (int e = 0; e < EACH; ++e) {
      if (kept & (1u << e)) {
        const uint k = tested + e * 32;
        uint2 entry;
        entry.x = begins;
        entry.y = as_type<uint>(float(multiplied(x, norm, factor, k)) * LIFT);
        memory.list[at] = entry;
        at += 1;
      }
      begins += 32 * groups;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    total += count;
    uint end = count;
    if (PADDED && count > 0) {
      // With the last channel again, times zero: it is in the cache, and no turn needs a branch.
      end = (count + ROWS * UNROLL - 1) / (ROWS * UNROLL) * (ROWS * UNROLL);
      uint2 last = memory.list[count - 1];
      last.y = 0;
      for (uint i = count + lane; i < end; i += THREADS) {
        memory.list[i] = last;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // Multiply. All loads of UNROLL channels first, so that they are in flight together.
    const bool owns = row < uint(ROWS) && output < band;
    for (int first = owns ? row : end; first < int(end); first += ROWS * UNROLL) {
      uint word[UNROLL][WORDS + 1];
      float step[UNROLL][SCALES];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int place = first + u * ROWS;
        const uint2 entry = memory.list[PADDED ? place : min(place, int(count) - 1)];
        const float value = PADDED || place < int(count) ? as_type<float>(entry.y) : 0.0f;
        const ulong group_at = entry.x;
        const device uint32_t* chunk = codes + group_at * (GROUP * BITS / 32);
        if (BITS % 4 == 0) {
#pragma unroll
          for (int j = 0; j < WORDS / 4; ++j) {
            const uint4 four = ((const device uint4*)chunk)[j];
            word[u][4 * j] = four.x;
            word[u][4 * j + 1] = four.y;
            word[u][4 * j + 2] = four.z;
            word[u][4 * j + 3] = four.w;
          }
        } else if (WORDS % 2 == 0) {
#pragma unroll
          for (int j = 0; j < WORDS / 2; ++j) {
            const uint2 two = ((const device uint2*)chunk)[j];
            word[u][2 * j] = two.x;
            word[u][2 * j + 1] = two.y;
          }
        } else {
#pragma unroll
          for (int j = 0; j < WORDS; ++j) {
            word[u][j] = chunk[j];
          }
        }
        word[u][WORDS] = 0;
#pragma unroll
        for (int g = 0; g < SCALES; ++g) {
          const float unit_weight = float(scale[group_at + g]);
          const float least = float(offset[group_at + g]);
          const float constant_weight = MIDDLE > 0 ? fma(float(MIDDLE), unit_weight, least) : least;
          step[u][g] = unit_weight * value;
          constant_part[g] = fma(constant_weight, value, constant_part[g]);
        }
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
        for (int c = 0; c < OUTPUTS; ++c) {
          const int start = c * BITS % 32;
          const bool early = start + BITS <= ROOM;
          const int shift = early ? start : start - 16;
          const uint here = word[u][c * BITS / 32];
          const uint next = word[u][c * BITS / 32 + 1];
          const uint view = early ? here : (here >> 16 | next << 16);
          const bool high = start >= 16;
          const int bits_before = start % 16 + BITS;  // of the half, this code's included
          float code;
          if (WAY == 0) {
            const uint bits = (view | TWO_TO_23_BITS) & (TWO_TO_23_BITS | MASK << shift);
            code = as_type<float>(bits) - (TWO_TO_23 + float(MIDDLE << shift));
          } else if (WAY == 2) {
            code = as_type<float>(view & MASK << shift);
          } else if (WAY == 3) {
            const bool fits = bits_before <= HALF_ROOM;
            const uint pair = (fits ? here : here >> 8) & (MASK << (fits ? start : start - 8) % 16) * both;
            code = float(as_type<float16_t>(half_of(pair, high)));
          } else if (!UNMASKED_BELOW) {
            code = float(view & MASK << shift);
          } else if (bits_before == 8) {
            code = float(byte_of(here, high));
          } else {
            code = float(half_of(bits_before == 16 ? here : here & ((1u << bits_before) - 1u) * both, high));
          }
          sums[c] = fma(code, step[u][c * SCALES / OUTPUTS], sums[c]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next pass writes the list
  }

  // A code was converted with those below it in its half: their sum, on the same scale, goes out again.
#pragma unroll
  for (int c = OUTPUTS - 1; c > 0; --c) {
    sums[c] -= UNMASKED_BELOW && c * BITS % 16 != 0 ? sums[c - 1] : 0.0f;
  }

  // Undo the shifts; add what is the same for the whole group.
#pragma unroll
  for (int c = 0; c < OUTPUTS; ++c) {
    const int start = c * BITS % 32;
    const int in_half = start % 16 + BITS <= HALF_ROOM ? start % 16 : (start - 8) % 16;
    const int shift = WAY == 3        ? in_half
                      : UNMASKED_BELOW ? start % 16
                      : start + BITS <= ROOM ? start
                                             : start - 16;
    const float unit_of_code = 1.0f / float(1u << shift) * CODE_ONE;
    sums[c] = fma(sums[c], unit_of_code, constant_part[c * SCALES / OUTPUTS] * (1.0f / LIFT));
  }

  // Sum over the rows: where a simdgroup holds several, its lanes first trade halves of their sums.
#pragma unroll
  for (int stage = 0; stage < 5; ++stage) {
    const int distance = LANES << stage;
    const int half_held = OUTPUTS >> (stage + 1);
    if (NARROW && distance < 32) {
      const bool upper = (lane & distance) != 0;
#pragma unroll
      for (int c = 0; c < half_held; ++c) {
        const float given = upper ? sums[c] : sums[c + half_held];
        sums[c] = (upper ? sums[c + half_held] : sums[c]) + simd_shuffle_xor(given, ushort(distance));
      }
    }
  }

  // Then through threadgroup memory, in slices that fit.
  const uint summand = NARROW ? me.simdgroup : row;
  const uint column = NARROW ? me.in_simdgroup : unit;
#pragma unroll
  for (int slice = 0; slice < HELD; slice += STEP) {
    if (summand < uint(SUMMANDS)) {
#pragma unroll
      for (int c = 0; c < STEP; ++c) {
        memory.partial[(summand * STEP + c) * COLUMNS + column] = sums[slice + c];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Halving is for many rows only: a thread sums eight in less time than a barrier takes.
    uint rows = SUMMANDS;
    for (; rows > 8; rows = (rows + 1) / 2) {
      const uint kept_rows = (rows + 1) / 2;
      for (uint j = lane; j < (rows - kept_rows) * WIDTH; j += THREADS) {
        memory.partial[j] += memory.partial[j + kept_rows * WIDTH];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint j = lane; j < uint(WIDTH); j += THREADS) {
      float sum = 0.0f;
      for (uint r = 0; r < rows; ++r) {
        sum += memory.partial[r * WIDTH + j];
      }
      const uint position = slice * COLUMNS + j;
      if (PARTIAL) {
        y[position] = Y(sum);
      } else {
        const uint in_band = tile_first + output_at(position, LANES, OUTPUTS);
        const uint at = band_index * band + in_band;
        if (in_band < band && at < own.outputs) {
          y[at] = Y(HAS_BIAS ? sum + bias[at] : sum);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next slice is written
  }
  if (tile_here == 0 && lane < uint(PARTIAL ? COUNTS : P) && lane % P == projection) {
    counts[lane] = counted_before + total;
  }
}

// K in one stripe. counted_before: of projection `me.index`, 0 for lanes that stand for none.
METAL_FUNC void sparse_gemv(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                            uint counted_before, device T* y, device uint32_t* active, uint projection,
                            threadgroup GemvMemory& memory, const Thread me) {
  multiply<false>(x, settings, packed, y, active, counted_before, 0, projection, memory, me);
}

// K in several stripes.
METAL_FUNC void sparse_gemv_stripe(const device T* x, const device uint32_t* settings,
                                   const device uint32_t* packed, device float* partials, uint projection,
                                   threadgroup GemvMemory& memory, const Thread me) {
  const uint positions = launch_of(settings).positions;
  device float* sums = partials + ulong(me.threadgroup_y) * positions;
  device uint32_t* counts = (device uint32_t*)(sums + positions - COUNTS);
  device float* tile = sums + me.threadgroup_x * (LANES * OUTPUTS);
  multiply<true>(x, settings, packed, tile, counts, 0, 0, projection, memory, me);
}
