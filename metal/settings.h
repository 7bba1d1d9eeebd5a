// `settings`, the uint32 array of a launch: one LaunchSettings, P ProjectionSettings, and behind them as
// float32 the thresholds, (P,) or with PER_CHANNEL (P, inputs); with HAS_BIAS each projection's biases,
// (outputs,); with NORMED the norm's weights, (inputs,). The two records are spqt_cli/backends/gpu/settings.py's:
// kernel_text.py writes their fields in front of this file.

METAL_FUNC const device LaunchSettings& launch_of(const device uint32_t* settings) {
  return *(const device LaunchSettings*)settings;
}

// The record of a projection; with P for it, where the records end.
METAL_FUNC const device ProjectionSettings* projection_settings(const device uint32_t* settings, uint projection) {
  return (const device ProjectionSettings*)(&launch_of(settings) + 1) + projection;
}

// The projection that a tile belongs to, of `count`.
METAL_FUNC uint projection_of(uint tile, const device uint32_t* settings, uint count) {
  uint projection = 0;
  for (uint p = 1; p < count; ++p) {
    projection += tile >= projection_settings(settings, p)->first_tile ? 1 : 0;
  }
  return projection;
}

METAL_FUNC const device float* thresholds_of(const device uint32_t* settings, uint count) {
  return (const device float*)projection_settings(settings, count);
}

// The number of biases before those of a projection; with P for it, of all.
METAL_FUNC uint biases_before(const device uint32_t* settings, uint projection) {
  uint before = 0;
  for (uint p = 0; p < projection; ++p) {
    before += projection_settings(settings, p)->outputs;
  }
  return before;
}
