// Random layers on the way back: slopes by their inputs, and their dot products with the inputs by group.
#include <algorithm>

#include "fuzz.h"

bool sloped(Random& random) {
  const int size = one_of(random, {32, 64, 128}), bands = 1 + below(random, 2), groups = 1 + below(random, 3);
  const int rows = below(random, 40) ? 1 + below(random, 40) : MOST_SLOPE_ROWS - below(random, 13);
  const int inputs = 1 + below(random, 80), band = groups * size, outputs = bands * band, padded = slope_rows(rows);
  const Array dy = random_values(random, FLOAT32, (size_t)rows * outputs, 2);
  const Array x = random_values(random, FLOAT32, (size_t)rows * inputs, 2);
  const Array w = random_values(random, FLOAT32, (size_t)bands * inputs * band, 2);
  Array packed(FLOAT32, (size_t)padded * outputs), work(FLOAT32, WORK);
  for (int o = 0; o < outputs; ++o)
    for (int r = 0; r < padded; ++r)
      packed.set(((size_t)(o / size) * padded + r) * size + o % size, r < rows ? dy[(size_t)r * outputs + o] : 0);
  Array dx(FLOAT32, x.n), dots(FLOAT32, (size_t)bands * inputs * groups);
  Sums by_inputs(dx.n), by_groups(dots.n);
  const bool adds = below(random, 2);
  if (adds) dots = random_values(random, FLOAT32, dots.n, 2);
  for (size_t i = 0; adds && i < dots.n; ++i) by_groups.add(i, dots[i]);
  for (int first = 0; first < inputs; first += SLOPE_INPUTS) {
    spoil_stack();
    kernels().slopes({packed.floats(), x.floats(), w.floats(), dx.floats(), dots.floats(), rows, inputs, bands, band,
                      size, first, adds}, work.floats());
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < inputs; ++i)
      for (int o = 0; o < outputs; ++o) {
        const size_t row = (size_t)(o / band) * inputs + i;
        const double one = dy[(size_t)r * outputs + o] * w[row * band + o % band];
        by_inputs.add((size_t)r * inputs + i, one);
        by_groups.add(row * groups + o % band / size, one * x[(size_t)r * inputs + i]);
      }
  const bool right = close("slopes by inputs", dx, by_inputs, inputs, inputs) &&
      close("dots by group", dots, by_groups, groups, groups) && work.intact(WORK, WORK);
  if (!right) std::printf(" rows %d inputs %d bands %d groups %d of %d\n", rows, inputs, bands, groups, size);
  return right;
}
