// What every kernel that is called from elsewhere is wrapped in.
#pragma once

// A kernel that leaves the registers' upper halves clean. GCC 12 and 13 may leave them dirty where a kernel ends
// with another function; code built for SSE, as MLX's is, then ran 40 times slower after a prompt's products.
template <auto kernel>
struct Clean;
template <class R, class... A, R (*kernel)(A...)>
struct Clean<kernel> {
  struct AtEnd {
    ~AtEnd() {
#if defined(__AVX__)
      _mm256_zeroupper();
#endif
    }
  };
  static R call(A... arguments) {
    AtEnd cleans;
    return kernel(arguments...);
  }
};
