// The kernels, compiled once for each instruction set: SPQT_ISA names the one of this object.
#include "kernels.h"

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
#include "simd.h"
#include "unpack.h"
#include "gemv.h"
#include "gemm.h"
#include "rows.h"
#include "decode.h"
}  // namespace

#define SPQT_STRING_OF(name) #name
#define SPQT_STRING(name) SPQT_STRING_OF(name)
#define SPQT_JOIN_OF(a, b) a##b
#define SPQT_JOIN(a, b) SPQT_JOIN_OF(a, b)

void SPQT_JOIN(compensate_, SPQT_ISA)(const Compensate&, float*);  // exact.cpp

extern const Kernels SPQT_JOIN(kernels_, SPQT_ISA);
const Kernels SPQT_JOIN(kernels_, SPQT_ISA) = {SPQT_STRING(SPQT_ISA), collect, gemv, finish, gemm, prepare, rows,
    rms_norm, rope, gate, sum_exp, attend_few, attend_many, SPQT_JOIN(compensate_, SPQT_ISA)};
