// Of AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): products with matrices in MLX's own layout are integer dot
// products. Its other kernels are those of AVX-512 (dispatch.cpp).
#include "kernels.h"

#include <time.h>

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

extern const HeadKernels head_avx512vnni;
constinit const HeadKernels head_avx512vnni = {Clean<prepare_dots>::call, Clean<dots>::call};
