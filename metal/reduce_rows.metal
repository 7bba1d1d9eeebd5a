// y = the sum of the stripes' partial sums of each row, plus the bias, in x's dtype; active = the stripes' counts.
// Used after sparse_rows.metal and matrix_rows.metal when K was cut into stripes.
//
// Arrays (P projections)
//   partials  (stripes, rows, positions) float32, as those write them: tiles, then COUNTS counts
//   settings  settings.h
//   rows      [0]: how many rows x has
//   y         (rows, outputs) T of the projection
//   active    (P, rows) uint32
// Constants: T, P, PER_CHANNEL, HAS_BIAS as in sparse_gemv.metal; TILE, outputs of a tile; COUNTS; THREADS.
// Grid: (positions of all tiles / THREADS, rounded up, rows) threadgroups of THREADS.

METAL_FUNC void reduce_rows(const device float* partials, const device uint32_t* settings, uint rows, device T* y,
                            device uint32_t* active, uint projection, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, projection);
  const uint token = me.threadgroup_y;
  const uint positions = launch.positions;
  const uint stripes = (launch.inputs + launch.stripe - 1) / launch.stripe;
  const uint threshold_count = PER_CHANNEL ? P * launch.inputs : P;
  const device float* bias = thresholds_of(settings, P) + threshold_count + biases_before(settings, projection);
  const uint position = me.threadgroup_x * THREADS + me.index;
  const uint tile_here = position / TILE - own.first_tile;
  const uint in_band = tile_here % own.tiles * TILE + position % TILE;
  const uint at = tile_here / own.tiles * own.band + in_band;
  const device float* here = partials + ulong(token) * positions;
  const ulong apart = ulong(rows) * positions;
  if (position < positions - COUNTS && in_band < own.band && at < own.outputs) {
    float sum = 0.0f;
#pragma unroll 8
    for (uint stripe = 0; stripe < stripes; ++stripe) {
      sum += here[stripe * apart + position];
    }
    y[ulong(token) * own.outputs + at] = T(HAS_BIAS ? sum + bias[at] : sum);
  }
  if (me.threadgroup_x == 0 && me.index < uint(P)) {
    uint met = 0;
    for (uint stripe = 0; stripe < stripes; ++stripe) {
      met += as_type<uint>(here[stripe * apart + positions - COUNTS + me.index]);
    }
    active[me.index * rows + token] = met;
  }
}
