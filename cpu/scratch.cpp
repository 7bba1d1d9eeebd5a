#include "scratch.h"

#include "kernels.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>

namespace {

constexpr std::align_val_t LINE{64};  // bytes of a cache line

bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value && *value;
}

}  // namespace

const bool poisoned = is_set("SPQT_POISON");

Scratch scratch(int stream, Purpose purpose, size_t floats) {
  struct Block {
    std::shared_ptr<float[]> data;
    size_t size = 0;
  };
  static auto* lock = new std::mutex;  // never destroyed: streams may still run at exit
  static auto* blocks = new std::map<std::pair<int, int>, Block>;
  std::lock_guard guard(*lock);
  Block& block = (*blocks)[{stream, purpose}];
  if (block.size < floats) {  // jobs that wait still hold the smaller one
    block.data = {new (LINE) float[floats], [](float* p) { operator delete[](p, LINE); }};
    block.size = floats;
  }
  return {block.data, floats};
}

float* thread_work() {
  alignas((size_t)LINE) static thread_local float work[WORK];
  poison(work, sizeof work);
  return work;
}
