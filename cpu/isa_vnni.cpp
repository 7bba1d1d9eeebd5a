// The kernels of AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): those of AVX-512, but for matrices in MLX's
// own layout, whose products are integer dot products.
#include "kernels.h"

#include <type_traits>
#include <utility>

#include <immintrin.h>

namespace {
#include "simd.h"
#include "unpack.h"
#include "gemv.h"
#include "rows.h"
#include "dots.h"
}  // namespace

#include "clean.h"

extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = [] {
  Kernels table = kernels_avx512;
  table.name = "avx512vnni";
  table.prepare = Clean<prepare_dots>::call;
  table.rows = Clean<dots>::call;
  return table;
}();
