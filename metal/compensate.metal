// A span of input channels rounded one after another, each error passed on to those after it in the span: what
// spqt_cli/fit/compensate.py defines between two of its matrix products, with grid.py's search of scales.
//
// Arrays (groups of SIZE outputs; SPAN channels; a group depends on no other)
//   wanted    (groups, SPAN, SIZE) float32: the channels' targets
//   moved     (groups, SPAN, SIZE) float32: the same with the errors of all spans before
//   factor    (SPAN, SPAN) float32: the span's corner of the unit upper triangular factor
//   codes     (groups, SPAN, SIZE) uint8
//   scales, biases  (groups, SPAN) float32, rounded to T
//   errors    (groups, SPAN, SIZE) float32: target less what the codes stand for
// Constants: T, which stores scales; BITS; SIZE, 32, 64 or 128; SPAN.
// Grid: one threadgroup of 32 for each group; lane i has outputs i, i + 32, ... of it, and no other reads them.

enum : int { OWN = SIZE / 32, MOST = (1 << BITS) - 1, CLIPS = 4, REFITS = 3 };

struct CompensateMemory {
  float error[SPAN * SIZE];
};

struct Values {
  float at[OWN];
};

struct Found {
  float scale, bias, squares;
  Values codes, values;
};

// Parts of the range of values that are cut off at either end, in all pairs.
METAL_FUNC float clipped(int choice) {
  return choice == 0 ? 0.0f : (choice == 1 ? 0.03f : (choice == 2 ? 0.06f : 0.1f));
}

METAL_FUNC float stored(float value) { return float(T(value)); }

METAL_FUNC float add_lanes(float value) {
  for (uint distance = 16; distance > 0; distance /= 2) {
    value += simd_shuffle_xor(value, ushort(distance));
  }
  return value;
}

METAL_FUNC float largest_of_lanes(float value) {
  for (uint distance = 16; distance > 0; distance /= 2) {
    const float other = simd_shuffle_xor(value, ushort(distance));
    value = other > value ? other : value;
  }
  return value;
}

METAL_FUNC Found encoded(const Values x, float scale, float bias) {
  Found found;
  found.scale = scale;
  found.bias = bias;
  const float inverse = 1.0f / scale;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const float place = (x.at[i] - bias) * inverse;
    const float within = place < 0.0f ? 0.0f : (place > float(MOST) ? float(MOST) : place);
    found.codes.at[i] = rint(within);
    found.values.at[i] = found.codes.at[i] * scale + bias;
    const float off = found.values.at[i] - x.at[i];
    squares += off * off;
  }
  found.squares = add_lanes(squares);
  return found;
}

METAL_FUNC Found search(const Values x) {
  float low = -x.at[0];
  float high = x.at[0];
  float sum = x.at[0];
#pragma unroll
  for (int i = 1; i < OWN; ++i) {
    low = -x.at[i] > low ? -x.at[i] : low;
    high = x.at[i] > high ? x.at[i] : high;
    sum += x.at[i];
  }
  low = -largest_of_lanes(low);
  high = largest_of_lanes(high);
  const float mean = add_lanes(sum) / float(SIZE);
  const float range = high - low;
  Found best;
  for (int pair = 0; pair < CLIPS * CLIPS; ++pair) {
    const float first = low + range * clipped(pair / CLIPS);
    const float step = (high - range * clipped(pair % CLIPS) - first) / float(MOST);
    const Found one = encoded(x, stored(step > 1e-7f ? step : 1e-7f), stored(first));
    if (pair == 0 || one.squares < best.squares) {
      best = one;
    }
  }
  for (int refit = 0; refit < REFITS; ++refit) {
    float codes = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      codes += best.codes.at[i];
    }
    const float centre = add_lanes(codes) / float(SIZE);
    float along = 0.0f;
    float across = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float off = best.codes.at[i] - centre;
      along += off * x.at[i];
      across += off * off;
    }
    along = add_lanes(along);
    across = add_lanes(across);
    const float slope = along / (across > 1e-9f ? across : 1e-9f);
    const float step = stored(fabs(slope) < 1e-7f ? best.scale : slope);
    const Found one = encoded(x, step, stored(mean - step * centre));
    if (one.squares < best.squares) {
      best = one;
    }
  }
  return best;
}

METAL_FUNC void compensate(const device float* wanted, const device float* moved, const device float* factor,
                           device uint8_t* codes, device float* scales, device float* biases,
                           device float* errors, threadgroup CompensateMemory& memory, const Thread me) {
  const ulong group = me.threadgroup_x;
  for (uint k = 0; k < uint(SPAN); ++k) {
    const ulong first = (group * SPAN + k) * SIZE + me.in_simdgroup;
    Values x;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      x.at[i] = moved[first + 32 * i];
    }
    for (uint before = 0; before < k; ++before) {
      const float part = factor[before * SPAN + k];
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        x.at[i] += part * memory.error[before * SIZE + 32 * i + me.in_simdgroup];
      }
    }
    const Found found = search(x);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float error = wanted[first + 32 * i] - found.values.at[i];
      memory.error[k * SIZE + 32 * i + me.in_simdgroup] = error;
      errors[first + 32 * i] = error;
      codes[first + 32 * i] = uint8_t(found.codes.at[i]);
    }
    if (me.in_simdgroup == 0) {
      scales[group * SPAN + k] = found.scale;
      biases[group * SPAN + k] = found.bias;
    }
  }
}
