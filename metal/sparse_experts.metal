// y of each pair of a row of x and an expert that was chosen for it: sparse_gemv.metal's product, with that
// expert's matrix. Used for decode steps of a mixture; gate and up share one launch.
//
// Arrays, as there but for
//   x        (rows, inputs) T
//   packed   weight, scales and biases (experts, bands, ...), one expert after another
//   indices  (pairs,) uint32: the expert of each pair; `each` pairs in turn have one row of x
//   y        (pairs, outputs) T; NaN where an index is no expert's
//   active   (pairs, P) uint32: the active channels
// Constants: those of sparse_gemv.metal, HAS_BIAS and NORMED 0; one stripe.
// Grid: (tiles of all projections, pairs) threadgroups of THREADS.

// expert: the pair's; each, experts: as above, and how many there are.
METAL_FUNC void sparse_experts(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                               uint expert, uint each, uint experts, device T* y, device uint32_t* active,
                               uint projection, threadgroup GemvMemory& memory, const Thread me) {
  const uint pair = me.threadgroup_y;
  const device ProjectionSettings& own = *projection_settings(settings, projection);
  device T* outputs = y + ulong(pair) * own.outputs;
  device uint32_t* counts = active + pair * P;
  if (expert < experts) {  // the same for the whole threadgroup
    const Thread alone = {me.threadgroup_x, 0, me.index, me.in_simdgroup, me.simdgroup};
    multiply<false>(x + ulong(pair / each) * launch_of(settings).inputs, settings, packed, outputs, counts, 0,
                    expert, projection, memory, alone);
  } else if (me.threadgroup_x == own.first_tile) {
    for (uint j = me.index; j < own.outputs; j += THREADS) {
      outputs[j] = T(as_type<float>(0x7FC00000u));
    }
    if (me.index == 0) {
      counts[projection] = 0;
    }
  }
}
