// Rows of x as matrix_rows.metal and gemm_rows.metal take them: channels below the threshold are zeros. Wants T,
// PER_CHANNEL, COUNTS.

METAL_FUNC bool is_active(float value, const device float* thresholds, uint k) {
  return !(fabs(value) < thresholds[PER_CHANNEL ? k : 0]);
}

// x of channel k as it is multiplied.
METAL_FUNC float masked(const device T* row, const device float* thresholds, uint k, uint last) {
  const float value = k < last ? float(row[k]) : 0.0f;
  return k < last && is_active(value, thresholds, k) ? value : 0.0f;
}

// Two channels from k on.
METAL_FUNC uint masked_two(const device T* row, const device float* thresholds, uint k, uint last) {
  return pack_pair<T>(masked(row, thresholds, k, last), masked(row, thresholds, k + 1, last));
}

// Two channels that were read as they are.
METAL_FUNC uint masked_pair(uint pair, float threshold) {
  const uint low = fabs(float(as_type<T>(ushort(pair)))) < threshold ? 0 : pair & 0xFFFFu;
  return low | (fabs(float(as_type<T>(ushort(pair >> 16)))) < threshold ? 0 : pair & 0xFFFF0000u);
}

// Whether any channel can be inactive.
METAL_FUNC bool has_mask(const device float* thresholds) { return PER_CHANNEL || thresholds[0] > 0.0f; }

// Counts the active channels from first to last of each row: the threadgroups of all tiles share the rows, a
// simdgroup counts one at a time. apart: entries from a row's count to the next's; copies of each, at most 32.
METAL_FUNC void count_rows(const device T* x, const device float* thresholds, uint inputs, uint first, uint last,
                           uint tokens, device uint32_t* counts, uint apart, uint copies, uint tile, uint tiles,
                           const Thread me) {
  for (uint t = tile + me.simdgroup * tiles; t < tokens; t += tiles * (THREADS / 32)) {
    uint active = last - first;
    if (has_mask(thresholds)) {
      const device T* row = x + ulong(t) * inputs;
      uint met = 0;
#pragma unroll 8
      for (uint k = first + me.in_simdgroup; k < last; k += 32) {
        met += is_active(float(row[k]), thresholds, k) ? 1 : 0;
      }
      active = simd_broadcast(simd_prefix_exclusive_sum(met) + met, ushort(31));
    }
    if (me.in_simdgroup < copies) {
      counts[t * apart + me.in_simdgroup] = active;
    }
  }
}
