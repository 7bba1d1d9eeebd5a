// Random shapes through every kernel and the thread pool, against sums in double. Not part of the extension:
// isa.py builds it for each instruction set, sanitize.py with sanitizers. Arrays are exactly as large as the
// contract says, on the heap, so that AddressSanitizer sees a read past any end; memory to work in or to write to
// is NaN beforehand; several callers at once give ThreadSanitizer its work.
#include "fuzz.h"

#include <cstdlib>
#include <thread>

#include "pool.h"

namespace {

int rounds(unsigned seed, int count) {
  Random random(seed);
  int wrong = 0;
  for (int i = 0; i < count; ++i)
    for (auto one : {sparse_gemv, collected, few_rows, many_rows, one_row, few_tokens, normalized, turned, attention, gated,
                     sum_of_exponentials, compensated, sloped})
      wrong += !one(random);
  return wrong;
}

}  // namespace

// fuzz ROUNDS: prints a line for each instruction set that the machine can execute
int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100;
  int wrong = 0;
  for (const char* name : ISAS) {
    if (!use_isa(name)) continue;
    set_threads(4);
    int other = 0;
    std::thread caller([&] { other = rounds(1, count); });
    wrong += rounds(2, count);
    set_threads(2);
    caller.join();
    wrong += other;
    std::printf("%s: %d rounds\n", name, 2 * count);
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
