// The kernels, compiled once for each instruction set: SPQT_ISA names the one of this object.
#include "kernels.h"

#include <time.h>

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
#include "slopes.h"
#include "rows.h"
#include "decode.h"
}  // namespace

#include "clean.h"

#define SPQT_STRING_OF(name) #name
#define SPQT_STRING(name) SPQT_STRING_OF(name)
#define SPQT_JOIN_OF(a, b) a##b
#define SPQT_JOIN(a, b) SPQT_JOIN_OF(a, b)

void SPQT_JOIN(compensate_, SPQT_ISA)(const Compensate&, float*);  // exact.cpp

extern const Kernels SPQT_JOIN(kernels_, SPQT_ISA);
constinit const Kernels SPQT_JOIN(kernels_, SPQT_ISA) = {SPQT_STRING(SPQT_ISA), Clean<together>::call,
    Clean<collect>::call, Clean<collect_rows>::call, Clean<gemv>::call,
    Clean<finish>::call, Clean<gemm>::call, Clean<prepare>::call, Clean<rows>::call, Clean<rms_norm>::call,
    Clean<rope>::call, Clean<gate>::call, Clean<sum_exp>::call, Clean<attend_few>::call, Clean<attend_many>::call,
    Clean<SPQT_JOIN(compensate_, SPQT_ISA)>::call, Clean<slopes>::call};
