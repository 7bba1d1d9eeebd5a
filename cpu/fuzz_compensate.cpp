// Random error-compensating rounding: each channel's error is what it should be, and about as small as its bits allow.
#include <algorithm>

#include "fuzz.h"

bool compensated(Random& random) {
  const int inputs = 1 + below(random, 200), size = one_of(random, {32, 64, 128});
  const int bits = one_of(random, {2, 3, 4, 5, 6, 8});
  const Type type = any_type(random);
  Array target = random_values(random, FLOAT32, (size_t)inputs * size, 1), errors = target;
  Array factor = random_values(random, FLOAT32, (size_t)inputs * inputs, 0.1f);
  for (int j = 0; j < inputs; ++j)
    for (int k = 0; k <= j; ++k) factor.set((size_t)j * inputs + k, j == k);
  Array scales(FLOAT32, inputs), biases(FLOAT32, inputs), work(FLOAT32, WORK);
  std::vector<uint8_t> codes((size_t)inputs * size, 0xff);
  spoil_stack();
  kernels().compensate({errors.floats(), factor.floats(), codes.data(), scales.floats(), biases.floats(), inputs, size,
                        bits, type}, work.floats());
  bool right = errors.intact(errors.n, errors.n) && scales.intact(inputs, inputs) && biases.intact(inputs, inputs) &&
      work.intact(WORK, WORK);
  double worst = 0;
  for (int k = 0; right && k < inputs; ++k) {
    double lowest = 1e300, highest = -1e300, squares = 0;
    Array exact(type, 1);
    for (float stored : {(float)scales[k], (float)biases[k]}) exact.set(0, stored), right &= exact[0] == stored;
    for (int i = 0; i < size; ++i) {
      const size_t at = (size_t)k * size + i;
      const double value = codes[at] * scales[k] + biases[k];
      right &= codes[at] < 1 << bits && std::fabs(target[at] - value - errors[at]) < 1e-5;
      double wanted = target[at];  // of this channel when its turn came
      for (int j = 0; j < k; ++j) wanted += factor[(size_t)j * inputs + k] * errors[(size_t)j * size + i];
      lowest = std::min(lowest, wanted), highest = std::max(highest, wanted);
      squares += (value - wanted) * (value - wanted);
    }
    const double step = (highest - lowest) / ((1 << bits) - 1) + std::max(std::fabs(lowest), highest) * 0x1p-7;
    worst = std::max(worst, squares / size / (step * step + 1e-12));
  }
  right &= worst < 0.3;  // evenly spread errors of half a step at most would have 1/12
  if (!right)
    std::printf("%s compensate: worst %g; inputs %d size %d bits %d type %d\n", kernels().name, worst, inputs, size, bits,
                type);
  return right;
}
