// active = counted + the active channels that all stripes met.
// Used beside reduce_stripes.metal, in those steps alone that are counted.
//
// Arrays
//   partials  (stripes, positions) float32, as sparse_gemv.metal writes them: tiles, then 32 counts
//   settings  as there
//   counted   (P,) uint32: active channels that earlier steps met;  active (P,): with this step's
// Grid: one threadgroup of 32.

const uint projection = thread_index_in_simdgroup;
const uint positions = settings[2];
const uint stripes = (settings[0] + settings[1] - 1) / settings[1];
if (projection < settings[3]) {
  uint met = counted[projection];
#pragma unroll 8
  for (uint stripe = 0; stripe < stripes; ++stripe) {
    met += as_type<uint>(partials[ulong(stripe + 1) * positions - 32 + projection]);
  }
  active[projection] = met;
}
