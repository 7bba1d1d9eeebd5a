// y = x @ W.T over the active channels: collects them, then multiplies only their chunks.
// Used for every decode step of a Zigzag layer; q/k/v or gate/up share one launch.
//
// Arrays (P projections of one input; gpu.py writes the lines that pick this threadgroup's own)
//   x           (inputs,) T
//   thresholds  (P,) or, with PER_CHANNEL, (P, inputs) float32
//   sizes       (4 + 5 P,) uint32: inputs, channels per stripe, stripes, rows of all projections, then for
//               each projection: first tile, band, tiles per band, first row, outputs to write
//   weight      (bands, inputs, band * BITS / 32) uint32;  scales, biases (bands, inputs, band / GROUP) S
//   bias        (rows,) float32, read with HAS_BIAS
//   y           (outputs,) Y of the projection when there is one stripe, else its part of (stripes, rows)
//   active      (P, stripes) uint32: active channels met
// Template integers
//   BITS, GROUP      the format
//   LANES            lanes side by side on one channel; each owns 32 outputs, a tile is LANES * 32 outputs
//   ROWS             channels in work at one time; THREADS = LANES * ROWS rounded up to whole simdgroups
//   UNROLL           channels a lane loads before it multiplies: bytes in flight
//   LIST             channels collected at one time, a multiple of THREADS
//   SLICE            outputs per lane that are summed over the rows at one time; divides 32
//   DECODE           how a code becomes a float: 0 exponent and subtract, 1 convert, 2 subnormal
// Grid: (tiles of all projections, stripes) threadgroups of THREADS.

const uint lane = thread_position_in_threadgroup.x;
const uint stripe = threadgroup_position_in_grid.y;
const uint inputs = sizes[0];
const uint stripe_first = min(stripe * sizes[1], inputs);
const uint stripe_last = min(stripe_first + sizes[1], inputs);

const uint about = 4 + 5 * projection;
const uint band = sizes[about + 1];
const uint tile_here = tile - sizes[about];
const uint band_index = tile_here / sizes[about + 2];
const uint tile_first = (tile_here - band_index * sizes[about + 2]) * (LANES * 32);  // in the band

const uint row = lane / LANES;
const uint unit = lane % LANES;  // which 32 outputs of the tile
const uint output = tile_first + unit * 32;
const bool owns = row < uint(ROWS) && output < band;
const uint words = band / 32 * BITS;  // of one chunk
const uint groups = band / GROUP;
const device uint32_t* codes = weight + ulong(band_index) * inputs * words + output / 32 * BITS;
const device S* scale = scales + ulong(band_index) * inputs * groups + output / GROUP;
const device S* offset = biases + ulong(band_index) * inputs * groups + output / GROUP;

// Active channels of this pass, in order, and the values of x there.
threadgroup uint channel_list[LIST];
threadgroup float value_list[LIST];
threadgroup uint simdgroup_count[THREADS / 32];

// Codes are used where they lie in the word, so lane output c holds its sum times 2^shift(c):
// a code that starts late in its word is taken from a view that begins 16 bits later.
constexpr uint MASK = (1u << BITS) - 1u;
constexpr int ROOM = DECODE == 1 ? 32 : 23;  // bits of a word where a code keeps its value
constexpr uint TWO_TO_23 = 0x4B000000u;      // the bits of 2^23, whose mantissa counts ones
constexpr float LIFT = 1.98070406e28f;       // 2^94: subnormal code times this times x stays normal

float sums[32];
for (int c = 0; c < 32; ++c) {
  sums[c] = 0.0f;
}
float constant_part = 0.0f;  // of the biases: the same for all outputs of a group
uint total = 0;

for (uint pass = stripe_first; pass < stripe_last; pass += LIST) {
  // Collect. Each thread tests EACH neighbouring channels; ranks keep the list in channel order.
  constexpr int EACH = LIST / THREADS;
  float values[EACH];
  uint mine = 0;
  uint kept = 0;  // bit set
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const uint k = pass + lane * EACH + e;
    values[e] = 0.0f;
    if (k < stripe_last) {
      values[e] = float(x[k]);
      const float threshold = thresholds[PER_CHANNEL ? projection * inputs + k : projection];
      if (!(fabs(values[e]) < threshold)) {
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
  for (uint g = 0; g < uint(THREADS / 32); ++g) {
    const uint in_group = simdgroup_count[g];
    at += g < simdgroup_index_in_threadgroup ? in_group : 0;
    count += in_group;
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    if (kept & (1u << e)) {
      channel_list[at] = pass + lane * EACH + e;
      value_list[at] = values[e];
      at += 1;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  total += count;

  // Multiply. All loads of UNROLL channels first, so that they are in flight together.
  for (uint first = owns ? row : count; first < count; first += ROWS * UNROLL) {
    uint word[UNROLL][BITS + 1];
    float step[UNROLL];
    float constant_step[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const uint entry = first + u * ROWS;
      for (int j = 0; j <= BITS; ++j) {
        word[u][j] = 0;
      }
      step[u] = 0.0f;
      constant_step[u] = 0.0f;
      if (entry < count) {
        const uint k = channel_list[entry];
        const float value = value_list[entry];
        const device uint32_t* chunk = codes + ulong(k) * words;
        if (BITS % 4 == 0) {
#pragma unroll
          for (int j = 0; j < BITS / 4; ++j) {
            const uint4 four = ((const device uint4*)chunk)[j];
            word[u][4 * j] = four.x;
            word[u][4 * j + 1] = four.y;
            word[u][4 * j + 2] = four.z;
            word[u][4 * j + 3] = four.w;
          }
        } else if (BITS % 2 == 0) {
#pragma unroll
          for (int j = 0; j < BITS / 2; ++j) {
            const uint2 two = ((const device uint2*)chunk)[j];
            word[u][2 * j] = two.x;
            word[u][2 * j + 1] = two.y;
          }
        } else {
#pragma unroll
          for (int j = 0; j < BITS; ++j) {
            word[u][j] = chunk[j];
          }
        }
        const uint group_at = k * groups;
        step[u] = float(scale[group_at]) * value * (DECODE == 2 ? LIFT : 1.0f);
        constant_step[u] = float(offset[group_at]) * value;
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      constant_part += constant_step[u];
#pragma unroll
      for (int c = 0; c < 32; ++c) {
        const int start = c * BITS % 32;
        const bool early = start + BITS <= ROOM;
        const int shift = early ? start : start - 16;
        const uint here = word[u][c * BITS / 32];
        const uint next = word[u][c * BITS / 32 + 1];
        const uint view = early ? here : (here >> 16 | next << 16);
        float code;
        if (DECODE == 0) {
          code = as_type<float>((view | TWO_TO_23) & (TWO_TO_23 | MASK << shift)) - 8388608.0f;
        } else if (DECODE == 1) {
          code = float(view & MASK << shift);
        } else {
          code = as_type<float>(view & MASK << shift);
        }
        sums[c] = fma(code, step[u], sums[c]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next pass writes the list
}

// Undo the shifts; add what is the same for the whole group.
#pragma unroll
for (int c = 0; c < 32; ++c) {
  const int start = c * BITS % 32;
  const int shift = start + BITS <= ROOM ? start : start - 16;
  const float unit_of_code = 1.0f / float(1u << shift) * (DECODE == 2 ? 36028797018963968.0f : 1.0f);
  sums[c] = fma(sums[c], unit_of_code, constant_part);  // 2^55 = 2^149 / LIFT
}

// Sum over the rows: lanes of one simdgroup by shuffles where tiles are narrow, then by halves.
constexpr bool NARROW = LANES < 32 && 32 % LANES == 0;
constexpr int SUMMANDS = NARROW ? THREADS / 32 : ROWS;
if (NARROW) {
  for (uint distance = LANES; distance < 32; distance *= 2) {
#pragma unroll
    for (int c = 0; c < 32; ++c) {
      sums[c] += simd_shuffle_xor(sums[c], ushort(distance));
    }
  }
}
constexpr int WIDTH = SLICE * LANES;
const uint summand = NARROW ? simdgroup_index_in_threadgroup : row;
const bool writes = NARROW ? thread_index_in_simdgroup < uint(LANES) : row < uint(ROWS);
threadgroup float partial[SUMMANDS * WIDTH];
#pragma unroll
for (int slice = 0; slice < 32; slice += SLICE) {
  if (writes) {
#pragma unroll
    for (int c = 0; c < SLICE; ++c) {
      partial[(summand * SLICE + c) * LANES + unit] = sums[slice + c];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint rows = SUMMANDS; rows > 1; rows = (rows + 1) / 2) {
    const uint kept_rows = (rows + 1) / 2;
    for (uint j = lane; j < (rows - kept_rows) * WIDTH; j += THREADS) {
      partial[j] += partial[j + kept_rows * WIDTH];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (uint j = lane; j < uint(WIDTH); j += THREADS) {
    const uint in_band = tile_first + j / SLICE * 32 + slice + j % SLICE;
    const uint at = band_index * band + in_band;
    if (in_band < band && at < sizes[about + 4]) {
      float sum = partial[j % SLICE * LANES + j / SLICE];
      if (HAS_BIAS) {
        sum += bias[sizes[about + 3] + at];
      }
      y[at] = Y(sum);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next slice is written
}
if (tile_here == 0 && lane == 0) {
  active[projection * sizes[2] + stripe] = total;
}
