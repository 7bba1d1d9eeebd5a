// y = the sum of the stripes' partial sums, plus the bias, in x's dtype; with GLU silu(gate) * up of two,
// with RESIDUAL plus the residual stream, with ROTATED turned by a position.
// Used after sparse_gemv.metal when K was cut into stripes.
//
// Arrays (P projections; kernel_text.py writes constants and OWN_Y)
//   partials  (stripes, positions) float32, as sparse_gemv.metal writes them: tiles, then 32 counts
//   settings  as there
//   y         (outputs,) Y of the projection; with GLU there is one, of the two projections' size
//   residual  (outputs,) Y, added to what y would be without it; read only with RESIDUAL, which takes P = 1
//   turns     (DIMS,) float32: cosines of the angles of a head's pairs, then sines; read only with ROTATED
// Template integers
//   LANES, OUTPUTS, P, HAS_BIAS  as there
//   PARTS     simdgroups that share the stripes of the same 32 positions
//   GLU       0 or 1; 1 takes two projections of equal outputs and bands, gate first
//   RESIDUAL  0 or 1
//   ROTATED   projections, from the first on, whose heads are turned: rotary positions; 0 for none
//   HEAD, DIMS  outputs of a head, and how many of them are turned; HEAD divides bands and outputs
//   TRADITIONAL  1 for pairs of neighbours, 0 for pairs half of DIMS apart
// Grid: positions of all tiles (with GLU of the first projection's) / 32 threadgroups of PARTS * 32.

const uint in_group = thread_index_in_simdgroup;
const uint part = simdgroup_index_in_threadgroup;
const uint positions = settings[2];
const uint stripes = (settings[0] + settings[1] - 1) / settings[1];
const uint first = threadgroup_position_in_grid.x * 32;
const uint tile = threadgroup_position_in_grid.x * 32 / (LANES * OUTPUTS);
const uint projection = projection_of(tile, settings, P);
const uint bias_first = biases_of(projection, settings, P, PER_CHANNEL ? P * settings[0] : P);
const uint about = numbers_of(projection);
device Y* y = OWN_Y;
const uint band = settings[about + 1];
const uint tiles = settings[about + 2];
const uint outputs = settings[about + 3];
const uint tile_here = tile - settings[about];
const uint in_tile = output_at(first + in_group - tile * (LANES * OUTPUTS), LANES, OUTPUTS);
const uint in_band = tile_here % tiles * (LANES * OUTPUTS) + in_tile;
const uint at = tile_here / tiles * band + in_band;
const bool owns = in_band < band && at < outputs;

// Some results take two sums: those of gate and up, or of a pair that is turned.
constexpr bool PAIRED = GLU || ROTATED > 0;
constexpr uint HALF = DIMS / 2;
const uint in_head = at % HEAD;
const bool turned = projection < uint(ROTATED) && owns && in_head < uint(DIMS);
const bool leads = TRADITIONAL ? in_head % 2 == 0 : in_head < HALF;  // which of the pair
const uint pair = TRADITIONAL ? in_head / 2 : in_head % (HALF > 0 ? HALF : 1);
const uint apart = TRADITIONAL ? 1 : HALF;
uint other = GLU ? settings[numbers_of(P - 1)] * (LANES * OUTPUTS) + first + in_group : first + in_group;
if (turned) {
  const uint partner = leads ? in_band + apart : in_band - apart;
  const uint partner_tile = tile - tile_here % tiles + partner / (LANES * OUTPUTS);
  other = partner_tile * (LANES * OUTPUTS) + position_at(partner % (LANES * OUTPUTS), LANES, OUTPUTS);
}

threadgroup float part_sum[(1 + PAIRED) * PARTS * 32];

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
part_sum[part * 32 + in_group] = sum;
if (PAIRED) {
  part_sum[(PARTS + part) * 32 + in_group] = other_sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (part == 0) {
  for (uint more = 1; more < uint(PARTS); ++more) {
    sum += part_sum[more * 32 + in_group];
    if (PAIRED) {
      other_sum += part_sum[(PARTS + more) * 32 + in_group];
    }
  }
  if (owns) {
    const Y value = Y(HAS_BIAS ? sum + as_type<float>(settings[bias_first + at]) : sum);
    if (GLU) {
      // Both are rounded to x's dtype first, as they are where the products stand alone.
      const float up = float(Y(HAS_BIAS ? other_sum + as_type<float>(settings[bias_first + outputs + at]) : other_sum));
      const float gate = float(value);
      y[at] = Y(gate / (1.0f + exp(-gate)) * up);
    } else if (turned) {
      const uint partner = leads ? at + apart : at - apart;
      const float mine = float(value);
      const float its = float(Y(HAS_BIAS ? other_sum + as_type<float>(settings[bias_first + partner]) : other_sum));
      y[at] = Y(mine * turns[pair] + (leads ? -its : its) * turns[HALF + pair]);
    } else {
      // The product is rounded to x's dtype first, as it is where the sum is an operation of its own.
      y[at] = RESIDUAL ? Y(float(value) + float(residual[at])) : value;
    }
  }
}
