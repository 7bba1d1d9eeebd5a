// Where things lie in `settings`, the numbers of a launch; sparse_gemv.metal says what they are.

// Where the seven numbers of a projection begin.
inline uint numbers_of(uint projection) { return 5 + 7 * projection; }

// The projection that a tile belongs to, of `count`.
inline uint projection_of(uint tile, const device uint32_t* settings, uint count) {
  uint projection = 0;
  for (uint p = 1; p < count; ++p) {
    projection += tile >= settings[numbers_of(p)] ? 1 : 0;
  }
  return projection;
}

// Where the biases of a projection begin, behind `thresholds` of them; with `count` for it, where all end.
inline uint biases_of(uint projection, const device uint32_t* settings, uint count, uint thresholds) {
  uint begin = numbers_of(count) + thresholds;
  for (uint p = 0; p < projection; ++p) {
    begin += settings[numbers_of(p) + 3];
  }
  return begin;
}
