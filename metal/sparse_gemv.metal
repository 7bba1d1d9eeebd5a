// y = x @ W.T over the active channels: collects them, then multiplies only their chunks.
// Used for every decode step of a Zigzag layer; q/k/v or gate/up share one launch. With NORMED x is first
// normalized by its root mean square, as mx.fast.rms_norm does it.
//
// Arrays (P projections of one input; kernel_text.py writes constants and OWN_Y)
//   x         (inputs,) T
//   settings  uint32: inputs, channels per stripe, positions of one stripe's partial sums, P, and the
//             float32 that NORMED adds to the mean square; for each projection its first tile, band, tiles
//             per band, outputs, and where its weight, scales and biases begin in `packed`; then, as
//             float32, the thresholds, (P,) or with PER_CHANNEL (P, inputs), with HAS_BIAS for each
//             projection (outputs,), and with NORMED the norm's weights, (inputs,)
//   packed    uint32 words of all projections: weight (bands, inputs, band * BITS / 32) uint32; scales and
//             biases (bands, inputs, band / GROUP) S
//   y         with one stripe (outputs,) Y of the projection; else this stripe's part of
//             (stripes, positions), float32, in the order in which the lanes hold the sums
//   counts    (COUNTS,) uint32: active channels met in this stripe, entry i for projection i % P; with one
//             stripe on top of `counted`, what earlier steps met, so that a running sum costs no launch
// Template integers
//   BITS, GROUP  the format
//   OUTPUTS      outputs of one lane: 32, or 64 where 64 divides every band
//   LANES        lanes side by side on one channel; a tile is LANES * OUTPUTS outputs
//   ROWS         channels in work at one time; THREADS = LANES * ROWS rounded up to whole simdgroups
//   UNROLL       channels a lane loads before it multiplies: bytes in flight
//   LIST         channels collected at one time, a multiple of THREADS, at most 32 THREADS and 65536
//   SLICE        sums per lane that are added over the rows at one time; a power of two
//   DECODE       how a code becomes a float: 0 exponent and subtract, 1 convert, 2 subnormal
//   PARTIAL, PER_CHANNEL, HAS_BIAS, NORMED  0 or 1: whether y takes partial sums, what settings holds, and
//                whether x is normalized
// Grid: (tiles of all projections, stripes) threadgroups of THREADS.

const uint lane = thread_position_in_threadgroup.x;
const uint inputs = settings[0];
const uint stripe_first = min(threadgroup_position_in_grid.y * settings[1], inputs);
const uint stripe_last = min(stripe_first + settings[1], inputs);

const uint tile = threadgroup_position_in_grid.x;
const uint projection = projection_of(tile, settings, P);
const uint about = numbers_of(projection);
device Y* y = OWN_Y;
const uint band = settings[about + 1];
const uint tile_here = tile - settings[about];
const uint band_index = tile_here / settings[about + 2];
const uint tile_first = (tile_here - band_index * settings[about + 2]) * (LANES * OUTPUTS);  // in the band

const uint row = lane / LANES;
const uint unit = lane % LANES;  // which outputs of the tile
const uint output = tile_first + unit * OUTPUTS;
const uint words = band / 32 * BITS;  // of one chunk
const uint groups = band / GROUP;
const ulong chunks_before = ulong(band_index) * inputs;  // of the bands before
const device uint32_t* codes = packed + settings[about + 4] + chunks_before * words + output / 32 * BITS;
const device S* scale = (const device S*)(packed + settings[about + 5]) + chunks_before * groups + output / GROUP;
const device S* offset = (const device S*)(packed + settings[about + 6]) + chunks_before * groups + output / GROUP;
const uint thresholds_first = numbers_of(P), thresholds = PER_CHANNEL ? P * inputs : P;
const uint bias_first = biases_of(projection, settings, P, thresholds);
const uint norm_first = HAS_BIAS ? biases_of(P, settings, P, thresholds) : thresholds_first + thresholds;

// Active channels of this pass, counted from its first, and x there.
threadgroup ushort channel_list[LIST];
threadgroup T value_list[LIST];
threadgroup uint simdgroup_count[THREADS / 32];

// Codes are used where they lie in the word, so output c of a lane holds its sum times 2^shift(c):
// a code that starts late in its word is taken from a view that begins 16 bits later.
constexpr uint MASK = (1u << BITS) - 1u;
constexpr int ROOM = DECODE == 1 ? 32 : 23;  // bits of a word where a code keeps its value
constexpr uint TWO_TO_23 = 0x4B000000u;      // the bits of 2^23, whose mantissa counts ones
constexpr float LIFT = 18446744073709551616.0f;  // 2^64: a subnormal code times this is in normal range
constexpr uint MIDDLE = DECODE == 0 ? 1u << (BITS - 1) : 0;  // taken off each code: smaller sums, less rounding
constexpr bool TOP_UNMASKED = DECODE == 1 && 32 % BITS == 0;  // one instruction less; undone below
constexpr int WORDS = OUTPUTS / 32 * BITS;   // of a lane's part of a chunk
constexpr int SCALES = OUTPUTS > GROUP ? OUTPUTS / GROUP : 1;

float sums[OUTPUTS] = {};
float constant_part[SCALES] = {};  // of the biases: the same for all outputs of a group
uint total = 0;

threadgroup float square_sum[NORMED ? THREADS / 32 : 1];  // every threadgroup needs that of the whole x
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
  if (thread_index_in_simdgroup == 0) {
    square_sum[simdgroup_index_in_threadgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = 0.0f;
#pragma unroll
  for (uint g = 0; g < uint(THREADS / 32); ++g) {
    squares += square_sum[g];
  }
  factor = rsqrt(squares / float(inputs) + as_type<float>(settings[4]));
}

for (uint pass = stripe_first; pass < stripe_last; pass += LIST) {
  // Collect. A simdgroup tests neighbouring channels, 32 at a time; any fixed order of the list will do.
  constexpr int EACH = LIST / THREADS;
  const uint tested = pass + simdgroup_index_in_threadgroup * (EACH * 32) + thread_index_in_simdgroup;
  uint kept = 0;  // bit set over the EACH tests of this lane
  uint mine = 0;
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const uint k = tested + e * 32;
    if (k < stripe_last) {
      const uint at = PER_CHANNEL ? projection * inputs + k : projection;
      const T value = NORMED ? T(as_type<float>(settings[norm_first + k]) * float(T(float(x[k]) * factor))) : x[k];
      if (!(fabs(float(value)) < as_type<float>(settings[thresholds_first + at]))) {
        kept |= 1u << e;
        mine += 1;
      }
    }
  }
  const uint before = simd_prefix_exclusive_sum(mine);
  if (thread_index_in_simdgroup == 31) {
    simdgroup_count[simdgroup_index_in_threadgroup] = before + mine;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint count = 0;
  uint at = before;
#pragma unroll
  for (uint g = 0; g < uint(THREADS / 32); ++g) {
    const uint in_group = simdgroup_count[g];
    at += g < simdgroup_index_in_threadgroup ? in_group : 0;
    count += in_group;
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    if (kept & (1u << e)) {
      const uint k = tested + e * 32;
      channel_list[at] = ushort(k - pass);
      value_list[at] = NORMED ? T(as_type<float>(settings[norm_first + k]) * float(T(float(x[k]) * factor))) : x[k];
      at += 1;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  total += count;

  // Multiply. All loads of UNROLL channels first, so that they are in flight together.
  const bool owns = row < uint(ROWS) && output < band;
  for (uint first = owns ? row : count; first < count; first += ROWS * UNROLL) {
    uint word[UNROLL][WORDS + 1];
    float step[UNROLL][SCALES];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      // Past the end: the last channel again, times zero. It is in the cache, and no branch is needed.
      const uint entry = min(first + u * ROWS, count - 1);
      const uint k = pass + channel_list[entry];
      const float value = first + u * ROWS < count ? float(value_list[entry]) : 0.0f;
      const device uint32_t* chunk = codes + ulong(k) * words;
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
        const uint group_at = k * groups + g;
        step[u][g] = float(scale[group_at]) * value * (DECODE == 2 ? LIFT : 1.0f);
        const float least = float(offset[group_at]);
        const float constant_weight = MIDDLE > 0 ? fma(float(MIDDLE), float(scale[group_at]), least) : least;
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
        float code;
        if (DECODE == 0) {
          code = as_type<float>((view | TWO_TO_23) & (TWO_TO_23 | MASK << shift)) - (8388608.0f + float(MIDDLE << shift));
        } else if (DECODE == 1) {
          code = float(TOP_UNMASKED && start + BITS == 32 ? here : view & MASK << shift);
        } else {
          code = as_type<float>(view & MASK << shift);
        }
        sums[c] = fma(code, step[u][c * SCALES / OUTPUTS], sums[c]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next pass writes the list
}

// The top code of a word was taken with all codes below it: their sums, on the same scale, go out again.
#pragma unroll
for (int c = 0; c < OUTPUTS; ++c) {
  const int codes_below = (c * BITS % 32) / BITS;
  if (TOP_UNMASKED && (c + 1) * BITS % 32 == 0) {
    float below = 0.0f;
#pragma unroll
    for (int other = c - codes_below; other < c; ++other) {
      below += sums[other];
    }
    sums[c] -= below;
  }
}

// Undo the shifts; add what is the same for the whole group.
#pragma unroll
for (int c = 0; c < OUTPUTS; ++c) {
  const int start = c * BITS % 32;
  const int shift = start + BITS <= ROOM ? start : start - 16;
  const float unit_of_code = 1.0f / float(1u << shift) * (DECODE == 2 ? 38685626227668133590597632.0f : 1.0f);
  sums[c] = fma(sums[c], unit_of_code, constant_part[c * SCALES / OUTPUTS]);  // 2^85 = 2^149 / LIFT
}

// Sum over the rows. Where a simdgroup holds several, its lanes first trade halves of their sums until
// each holds all rows of its own HELD outputs.
constexpr bool NARROW = LANES < 32 && 32 % LANES == 0;
constexpr int HELD = NARROW ? OUTPUTS * LANES / 32 : OUTPUTS;
constexpr int COLUMNS = NARROW ? 32 : LANES;
constexpr int SUMMANDS = NARROW ? THREADS / 32 : ROWS;
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
constexpr int STEP = SLICE < HELD ? SLICE : HELD;
constexpr int WIDTH = STEP * COLUMNS;
threadgroup float partial[SUMMANDS * WIDTH];
const uint summand = NARROW ? simdgroup_index_in_threadgroup : row;
const uint column = NARROW ? thread_index_in_simdgroup : unit;
#pragma unroll
for (int slice = 0; slice < HELD; slice += STEP) {
  if (summand < uint(SUMMANDS)) {
#pragma unroll
    for (int c = 0; c < STEP; ++c) {
      partial[(summand * STEP + c) * COLUMNS + column] = sums[slice + c];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Halving is for many rows only: a thread sums eight in less time than a barrier takes.
  uint rows = SUMMANDS;
  for (; rows > 8; rows = (rows + 1) / 2) {
    const uint kept_rows = (rows + 1) / 2;
    for (uint j = lane; j < (rows - kept_rows) * WIDTH; j += THREADS) {
      partial[j] += partial[j + kept_rows * WIDTH];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (uint j = lane; j < uint(WIDTH); j += THREADS) {
    float sum = 0.0f;
    for (uint r = 0; r < rows; ++r) {
      sum += partial[r * WIDTH + j];
    }
    const uint position = slice * COLUMNS + j;
    if (PARTIAL) {
      y[position] = Y(sum);
    } else {
      const uint in_band = tile_first + output_at(position, LANES, OUTPUTS);
      const uint at = band_index * band + in_band;
      if (in_band < band && at < settings[about + 3]) {
        y[at] = Y(HAS_BIAS ? sum + as_type<float>(settings[bias_first + at]) : sum);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next slice is written
}
if (tile_here == 0 && lane < uint(COUNTS) && lane % P == projection) {
  counts[lane] = counted_before + total;
}
