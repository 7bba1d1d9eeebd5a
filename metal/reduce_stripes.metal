// y = the sum of the stripes' partial sums, plus the bias, in x's dtype.
// Used after sparse_gemv.metal when K was cut into stripes.
//
// Arrays (P projections; gpu.py writes the lines that pick this threadgroup's own)
//   partials  (stripes, rows) float32
//   counts    (P, stripes) uint32
//   sizes     as in sparse_gemv.metal
//   bias      (rows,) float32, read with HAS_BIAS
//   y         (outputs,) Y of the projection
//   active    (P,) uint32
// Template integers
//   PARTS     simdgroups that share the stripes of the same 32 outputs
//   P         projections
// Grid: rows / 32 threadgroups of PARTS * 32. Rows of a projection are whole groups, so whole 32s.

const uint in_group = thread_index_in_simdgroup;
const uint part = simdgroup_index_in_threadgroup;
const uint stripes = sizes[2];
const uint rows = sizes[3];
const uint at = row_first + in_group;

threadgroup float part_sum[PARTS * 32];

float sum = 0.0f;
#pragma unroll 4
for (uint stripe = part; stripe < stripes; stripe += PARTS) {
  sum += partials[ulong(stripe) * rows + at];
}
part_sum[part * 32 + in_group] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (part == 0) {
  for (uint other = 1; other < uint(PARTS); ++other) {
    sum += part_sum[other * 32 + in_group];
  }
  const uint about = 4 + 5 * projection;
  const uint output = at - sizes[about + 3];
  if (output < sizes[about + 4]) {
    if (HAS_BIAS) {
      sum += bias[at];
    }
    y[output] = Y(sum);
  }
}
if (threadgroup_position_in_grid.x == 0 && part == 0 && in_group < uint(P)) {
  uint total = 0;
  for (uint stripe = 0; stripe < stripes; ++stripe) {
    total += counts[in_group * stripes + stripe];
  }
  active[in_group] = total;
}
