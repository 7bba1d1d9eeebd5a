// The end of a mixture's block: the residual stream plus what the chosen experts gave, each times its weight.
//
// Arrays
//   h        (WIDTH,) T
//   y        (CHOSEN, WIDTH) T
//   weights  (CHOSEN,) float32
//   out      (WIDTH,) T
// Constants: T, WIDTH, CHOSEN, THREADS. Grid: WIDTH / THREADS, rounded up, threadgroups of THREADS.

struct ExpertWeights {
  float of[CHOSEN];
};

METAL_FUNC void add_experts(const device T* h, const device T* y, const ExpertWeights weights, device T* out,
                            const Thread me) {
  const uint at = me.threadgroup_x * THREADS + me.index;
  if (at < uint(WIDTH)) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHOSEN; ++i) {
      sum = fma(float(y[i * WIDTH + at]), weights.of[i], sum);
    }
    // The sum is rounded to T first, as it is where the residual sum is an operation of its own.
    out[at] = T(float(T(sum)) + float(h[at]));
  }
}
