// active = counted + the active channels that all stripes met.
// Used after sparse_gemv.metal when K was cut into stripes, in the steps that are counted.
//
// Arrays
//   partials  (stripes, positions) float32, as sparse_gemv.metal writes them: tiles, then COUNTS counts
//   settings  settings.h
//   active    (P,) uint32: `counted`, what earlier steps met, plus this step's
// Constants: COUNTS, as there. Grid: one threadgroup of 32; lane i stands for projection i.

METAL_FUNC void count_active(const device float* partials, const device uint32_t* settings,
                             uint counted_before, device uint32_t* active, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const uint stripes = (launch.inputs + launch.stripe - 1) / launch.stripe;
  if (me.index < launch.projections) {
    uint met = counted_before;
#pragma unroll 8
    for (uint stripe = 0; stripe < stripes; ++stripe) {
      met += as_type<uint>(partials[ulong(stripe + 1) * launch.positions - COUNTS + me.index]);
    }
    active[me.index] = met;
  }
}
