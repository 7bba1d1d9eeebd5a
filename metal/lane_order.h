// Who a lane is.
struct Thread {
  uint threadgroup_x, threadgroup_y;  // of the grid
  uint index;                         // in the threadgroup
  uint in_simdgroup, simdgroup;       // index in the simdgroup, and which one
};

// The order in which the lanes of sparse_gemv.metal hold the sums of a tile, so that they are stored side
// by side: position -> output of the tile. lanes, outputs: LANES and OUTPUTS there.
METAL_FUNC uint output_at(uint position, uint lanes, uint outputs) {
  const bool narrow = lanes < 32 && 32 % lanes == 0;
  const uint columns = narrow ? 32 : lanes;
  const uint column = position % columns;
  uint output = column % lanes * outputs + position / columns;
  uint half_held = outputs / 2;
  for (uint distance = lanes; narrow && distance < 32; distance *= 2) {
    output += (column & distance) != 0 ? half_held : 0;
    half_held /= 2;
  }
  return output;
}

// The other way: output of the tile -> position.
METAL_FUNC uint position_at(uint output, uint lanes, uint outputs) {
  const bool narrow = lanes < 32 && 32 % lanes == 0;
  uint column = output / outputs;
  uint held = output % outputs;
  uint half_held = outputs / 2;
  for (uint distance = lanes; narrow && distance < 32; distance *= 2) {
    column += held >= half_held ? distance : 0;
    held -= held >= half_held ? half_held : 0;
    half_held /= 2;
  }
  return held * (narrow ? 32 : lanes) + column;
}
