// w = the weights of one projection as T, so that x @ w is a plain matmul: code * scale + bias, rounded once.
// Used for prompts of many rows, where MLX's matmul of whole matrices is faster than kernels that unpack as they go.
//
// Arrays: settings and packed as in sparse_gemv.metal, of one projection, with tiles of OUTPUTS outputs
//   w  (inputs, bands * band) T: outputs side by side, with those that fill up the last band
// Constants
//   T, S, BITS, GROUP, COUNTS  as there
//   OUTPUTS  8, of one lane: 16 bytes of weights where T has 16 bits
//   UNROLL   channels of one lane, loaded before the first is written
// Grid: (tiles / THREADS, inputs / UNROLL) threadgroups of THREADS, both rounded up.

enum : int { WEIGHT_WORDS = OUTPUTS * int(sizeof(T)) / 4 };

METAL_FUNC float weight_at(const LaneCodes codes, int c, float scale, float bias) {
  const uint code = bits_from(codes, c * BITS) & ((1u << BITS) - 1u);
  return fma(as_type<float>(code | 0x4B000000u) - 8388608.0f, scale, bias);  // 2^23 + code, less 2^23
}

METAL_FUNC void dequantize(const device uint32_t* settings, const device uint32_t* packed, device T* w,
                           const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, 0);
  const uint inputs = launch.inputs;
  const uint width = launch.positions - COUNTS;  // outputs of all bands
  const uint tile = me.threadgroup_x * THREADS + me.index;
  if (tile >= width / OUTPUTS) {
    return;
  }
  const uint band_index = tile / own.tiles;
  const uint output = (tile - band_index * own.tiles) * OUTPUTS;  // in the band
  const uint words = own.band / 32 * BITS;                        // of one chunk
  const uint groups = own.band / GROUP;
  const ulong chunks_before = ulong(band_index) * inputs;
  const device uint32_t* codes = packed + own.weight + chunks_before * words;
  const device S* scale = (const device S*)(packed + own.scales) + chunks_before * groups + output / GROUP;
  const device S* offset = (const device S*)(packed + own.biases) + chunks_before * groups + output / GROUP;

  const uint first = me.threadgroup_y * UNROLL;
  LaneCodes word[UNROLL];
  float scaled[UNROLL], least[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const uint k = min(first + u, inputs - 1);
    word[u] = lane_codes(strides_behind(codes, k, words * 4), output, words);
    scaled[u] = float(*strides_behind(scale, k, groups * sizeof(S)));
    least[u] = float(*strides_behind(offset, k, groups * sizeof(S)));
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    uint made[WEIGHT_WORDS];
#pragma unroll
    for (int j = 0; j < WEIGHT_WORDS; ++j) {
      const int c = sizeof(T) == 4 ? j : 2 * j;
      const float weight = weight_at(word[u], c, scaled[u], least[u]);
      const float next = weight_at(word[u], (c + 1) % OUTPUTS, scaled[u], least[u]);
      made[j] = sizeof(T) == 4 ? as_type<uint>(weight) : halves(T(weight), T(next));
    }
    if (first + u < inputs) {
      device uint4* to = (device uint4*)(w + ulong(first + u) * width + tile * OUTPUTS);
#pragma unroll
      for (int j = 0; j < WEIGHT_WORDS / 4; ++j) {
        uint4 four;
        four.x = made[4 * j];
        four.y = made[4 * j + 1];
        four.z = made[4 * j + 2];
        four.w = made[4 * j + 3];
        to[j] = four;
      }
    }
  }
}
