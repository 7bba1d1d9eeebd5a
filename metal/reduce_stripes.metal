// y = the sum of the stripes' partial sums, plus the bias, in x's dtype; with GLU silu(gate) * up of two,
// with RESIDUAL plus the residual stream, with ROTATED the heads are turned by a position.
// Used after sparse_gemv.metal when K was cut into stripes.
//
// Arrays (P projections)
//   partials  (stripes, positions) float32, as sparse_gemv.metal writes them: tiles, then COUNTS counts
//   settings  settings.h
//   y         (outputs,) T of the projection; with GLU there is one, of the two projections' size
//   residual  (outputs,) T, added to what y would be without it; read only with RESIDUAL, which takes P = 1
//   turns     (DIMS,) float32: cosines of the angles of a head's pairs, then sines; read only with ROTATED
// Constants (kernel_text.py writes them in front)
//   T, LANES, OUTPUTS, P, PER_CHANNEL, HAS_BIAS  as in sparse_gemv.metal
//   PARTS     simdgroups that share the stripes of the same 32 positions
//   GLU       0 or 1; 1 takes two projections of equal outputs and bands, gate first
//   RESIDUAL  0 or 1
//   ROTATED   projections, from the first on, whose heads are turned: rotary positions; 0 for none
//   HEAD, DIMS  outputs of a head, and how many of them are turned; HEAD divides bands and outputs
//   TRADITIONAL  1 for pairs of neighbours, 0 for pairs half of DIMS apart
// Grid: positions of all tiles (with GLU of the first projection's) / 32 threadgroups of PARTS * 32.

enum : int {
  // Some results take two sums: those of gate and up, or of a pair that is turned.
  PAIRED = GLU || ROTATED > 0,
  HALF = DIMS / 2
};

struct ReduceMemory {
  float part_sum[(1 + PAIRED) * PARTS * 32];
};

METAL_FUNC void reduce_stripes(const device float* partials, const device uint32_t* settings,
                               const device T* residual, const device float* turns, device T* y,
                               uint projection, threadgroup ReduceMemory& memory, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, projection);
  const uint in_group = me.in_simdgroup;
  const uint part = me.simdgroup;
  const uint positions = launch.positions;
  const uint stripes = (launch.inputs + launch.stripe - 1) / launch.stripe;
  const uint first = me.threadgroup_x * 32;
  const uint tile = first / (LANES * OUTPUTS);
  const uint threshold_count = PER_CHANNEL ? P * launch.inputs : P;
  const device float* bias = thresholds_of(settings, P) + threshold_count + biases_before(settings, projection);
  const uint band = own.band;
  const uint tiles = own.tiles;
  const uint outputs = own.outputs;
  const uint tile_here = tile - own.first_tile;
  const uint in_tile = output_at(first + in_group - tile * (LANES * OUTPUTS), LANES, OUTPUTS);
  const uint in_band = tile_here % tiles * (LANES * OUTPUTS) + in_tile;
  const uint at = tile_here / tiles * band + in_band;
  const bool owns = in_band < band && at < outputs;

  const uint in_head = at % HEAD;
  const bool turned = projection < uint(ROTATED) && owns && in_head < uint(DIMS);
  const bool leads = TRADITIONAL ? in_head % 2 == 0 : in_head < uint(HALF);  // which of the pair
  const uint pair = TRADITIONAL ? in_head / 2 : in_head % (HALF > 0 ? int(HALF) : 1);
  const uint apart = TRADITIONAL ? 1 : int(HALF);
  uint other = first + in_group;
  if (GLU) {
    other += projection_settings(settings, P - 1)->first_tile * (LANES * OUTPUTS);
  }
  if (turned) {
    const uint partner = leads ? in_band + apart : in_band - apart;
    const uint partner_tile = tile - tile_here % tiles + partner / (LANES * OUTPUTS);
    other = partner_tile * (LANES * OUTPUTS) + position_at(partner % (LANES * OUTPUTS), LANES, OUTPUTS);
  }

  float sum = 0.0f;
  float other_sum = 0.0f;
#pragma unroll 4
  for (uint stripe = part; stripe < stripes; stripe += PARTS) {
    const device float* here = partials + ulong(stripe) * positions;
    sum += here[first + in_group];
    if (PAIRED) {
      other_sum += here[other];
    }
  }
  memory.part_sum[part * 32 + in_group] = sum;
  if (PAIRED) {
    memory.part_sum[(PARTS + part) * 32 + in_group] = other_sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (part == 0) {
    for (uint more = 1; more < uint(PARTS); ++more) {
      sum += memory.part_sum[more * 32 + in_group];
      if (PAIRED) {
        other_sum += memory.part_sum[(PARTS + more) * 32 + in_group];
      }
    }
    if (owns) {
      const T value = T(HAS_BIAS ? sum + bias[at] : sum);
      if (GLU) {
        // Both are rounded to x's dtype first, as they are where the products stand alone.
        const float up = float(T(HAS_BIAS ? other_sum + bias[outputs + at] : other_sum));
        const float gate = float(value);
        y[at] = T(gate / (1.0f + exp(-gate)) * up);
      } else if (turned) {
        const uint partner = leads ? at + apart : at - apart;
        const float mine = float(value);
        const float its = float(T(HAS_BIAS ? other_sum + bias[partner] : other_sum));
        y[at] = T(mine * turns[pair] + (leads ? -its : its) * turns[HALF + pair]);
      } else {
        // The product is rounded to x's dtype first, as it is where the sum is an operation of its own.
        y[at] = RESIDUAL ? T(float(value) + float(residual[at])) : value;
      }
    }
  }
}
