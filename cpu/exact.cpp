// The kernel whose results are equal for every instruction set: no multiplication and addition become one operation.
#include "kernels.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
#include "simd.h"
#include "compensate.h"
}  // namespace

#define SPQT_JOIN_OF(a, b) a##b
#define SPQT_JOIN(a, b) SPQT_JOIN_OF(a, b)

void SPQT_JOIN(compensate_, SPQT_ISA)(const Compensate& job, float* work) { compensate(job, work); }
