// Which instruction set runs: the widest that the machine has, chosen once.
#include "kernels.h"

#include <atomic>
#include <cstring>

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
#endif
#if defined(__x86_64__) && !defined(SPQT_WITHOUT_AVX512)
#define SPQT_WITH_AVX512
extern const Kernels kernels_avx512;
extern const HeadKernels head_avx512vnni;
#endif

namespace {

#if defined(SPQT_WITH_AVX512)
const Kernels& kernels_avx512vnni() {
  static const Kernels table = [] {
    Kernels found = kernels_avx512;
    found.name = "avx512vnni";
    found.prepare = head_avx512vnni.prepare;
    found.rows = head_avx512vnni.rows;
    return found;
  }();
  return table;
}
#endif

const Kernels* supported(const char* name) {
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2");  // every such machine has F16C, which older compilers can't ask for
  if (avx2 && !std::strcmp(name, "avx2")) return &kernels_avx2;
#endif
#if defined(SPQT_WITH_AVX512)
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd");
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  if (vnni && !std::strcmp(name, "avx512vnni")) return &kernels_avx512vnni();
  if (avx512 && !std::strcmp(name, "avx512")) return &kernels_avx512;
#endif
  return std::strcmp(name, "baseline") ? nullptr : &kernels_baseline;
}

const Kernels* best() {
  for (const char* name : ISAS)
    if (const Kernels* found = supported(name)) return found;
  return &kernels_baseline;
}

const Kernels*& chosen() {
  static const Kernels* table = best();
  return table;
}

std::atomic<int> wish{MEASURED};
std::atomic<int64_t> tiles{0};

}  // namespace

int subnormals() { return wish.load(std::memory_order_relaxed); }
void use_subnormals(int one) { wish.store(one, std::memory_order_relaxed); }
void count_subnormal() { tiles.fetch_add(1, std::memory_order_relaxed); }
int64_t subnormal_tiles() { return tiles.load(std::memory_order_relaxed); }

const Kernels& kernels() { return *chosen(); }

bool has_isa(const char* name) { return supported(name) != nullptr; }

bool use_isa(const char* name) {
  const Kernels* table = supported(name);
  if (table) chosen() = table;
  return table != nullptr;
}
