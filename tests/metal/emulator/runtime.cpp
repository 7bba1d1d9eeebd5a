// Runs the lanes of one threadgroup as fibers, in lockstep at barriers and simdgroup operations.
// What they read and write goes into books.h. Neither file is instrumented.
#include <setjmp.h>
#include <ucontext.h>

#include "books.h"

namespace {

constexpr uint64_t STACK = 96 << 10;  // bytes of a lane
constexpr uint SIMD = 32;

enum State { READY, AT_BARRIER, AT_PREFIX, AT_SHUFFLE, AT_BROADCAST, AT_TILE, AT_ROWS, AT_COLUMNS, FINISHED };

struct Fiber {
  jmp_buf point;
  ucontext_t context;
  bool started = false;
  State state = READY;
  void* site = nullptr;
  uint64_t value = 0;
  uint mask = 0;
  float a[8], b[4], c[4];  // of a tile that is multiplied
  ushort row[8];           // of a tile that is loaded
  Lane lane;
};

std::vector<Fiber> fibers;
std::vector<void*> arguments;
uint8_t* stacks = nullptr;
uint64_t stacks_bytes = 0;
ucontext_t scheduler_context;
jmp_buf scheduler;
Fiber* running = nullptr;
void (*kernel)(void**) = nullptr;

void wait(State state, void* site) {
  running->state = state;
  running->site = site;
  if (!_setjmp(running->point)) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    kernel(arguments.data());
    wait(FINISHED, nullptr);
  }
}

void resume(Fiber& fiber) {
  running = &fiber;
  acting = &fiber.lane;
  fiber.state = READY;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  running = nullptr;
  acting = nullptr;
}

// The tile that the lanes hold together, as PTX's mma.m16n8k16 has it: lane 4 g + q holds of a rows g and g + 8, of b
// column g, of both channels 2 q, 2 q + 1, 2 q + 8, 2 q + 9; of c rows g, g + 8 and columns 2 q, 2 q + 1.
void multiply_tile(Fiber* lanes) {
  float a[16][16], b[16][8];
  for (uint i = 0; i < SIMD; ++i) {
    const uint g = i / 4, q = i % 4;
    for (uint j = 0; j < 8; ++j) a[g + j / 2 % 2 * 8][2 * q + j % 2 + j / 4 * 8] = lanes[i].a[j];
    for (uint j = 0; j < 4; ++j) b[2 * q + j % 2 + j / 2 * 8][g] = lanes[i].b[j];
  }
  for (uint i = 0; i < SIMD; ++i) {
    for (uint j = 0; j < 4; ++j) {
      float& sum = lanes[i].c[j];
      for (uint k = 0; k < 16; ++k) sum += a[i / 4 + j / 2 * 8][k] * b[k][i % 4 * 2 + j % 2];
    }
  }
}

// Four 8 x 8 tiles whose rows the lanes hold, dealt out as PTX's ldmatrix does: lane 4 g + q gets of each row g and
// columns 2 q and 2 q + 1, or column g and rows 2 q and 2 q + 1.
void share_tiles(Fiber* lanes, bool transposed) {
  ushort tiles[4][8][8];
  for (uint i = 0; i < SIMD; ++i) memcpy(tiles[i / 8][i % 8], lanes[i].row, sizeof lanes[i].row);
  for (uint i = 0; i < SIMD; ++i) {
    for (uint j = 0; j < 8; ++j) {
      const uint g = i / 4, q = 2 * (i % 4) + j % 2;
      lanes[i].row[j] = transposed ? tiles[j / 2][q][g] : tiles[j / 2][g][q];
    }
  }
}

// All lanes of a simdgroup stand at one operation: give each its result. False where they don't.
bool exchange(Fiber* lanes) {
  const State state = lanes[0].state;
  if (state < AT_PREFIX || state > AT_COLUMNS) return false;
  for (uint i = 1; i < SIMD; ++i) {
    if (lanes[i].state != state || lanes[i].site != lanes[0].site) return false;
  }
  if (state == AT_TILE) multiply_tile(lanes);
  if (state == AT_ROWS || state == AT_COLUMNS) share_tiles(lanes, state == AT_COLUMNS);
  uint64_t results[SIMD];
  uint sum = 0;
  for (uint i = 0; i < SIMD; ++i) {
    const uint from = state == AT_BROADCAST ? lanes[i].mask : i ^ lanes[i].mask;
    results[i] = state == AT_PREFIX ? sum : lanes[from % SIMD].value;
    sum += uint(lanes[i].value);
  }
  for (uint i = 0; i < SIMD; ++i) {
    lanes[i].value = results[i];
    lanes[i].state = READY;
  }
  return true;
}

bool all_in(State state) {
  for (const Fiber& fiber : fibers) {
    if (fiber.state != state || (state == AT_BARRIER && fiber.site != fibers[0].site)) return false;
  }
  return true;
}

// One threadgroup to its end; false after a report that leaves the lanes stuck.
bool run_threadgroup() {
  epoch += 1;
  for (Array& array : arrays) {
    memset((void*)array.start, 0xAB, array.bytes);
    for (Word& word : array.words) word = Word();
  }
  for (;;) {
    for (Fiber& fiber : fibers) {
      if (fiber.state == READY) resume(fiber);
    }
    bool moved = false;
    for (size_t first = 0; first < fibers.size(); first += SIMD) moved |= exchange(&fibers[first]);
    if (moved) continue;
    if (all_in(FINISHED)) return true;
    if (!all_in(AT_BARRIER)) {
      report("divergence: the lanes of threadgroup %u wait at different barriers or simdgroup operations",
             threadgroup_number - 1);
      return false;
    }
    epoch += 1;
    for (Fiber& fiber : fibers) fiber.state = READY;
  }
}

void make_fibers(uint threads) {
  if (stacks_bytes < threads * STACK) {
    if (stacks) munmap(stacks, stacks_bytes);
    stacks_bytes = threads * STACK;
    stacks = (uint8_t*)mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  fibers.assign(threads, Fiber());
  for (uint i = 0; i < threads; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stacks + i * STACK;
    fibers[i].context.uc_stack.ss_size = STACK;
    fibers[i].context.uc_link = &scheduler_context;
    makecontext(&fibers[i].context, fiber_main, 0);
  }
}

}  // namespace

extern "C" {

const Lane* emulator_lane() { return &running->lane; }

void emulator_run(void (*entry)(void**), uint grid_x, uint grid_y, uint threads) {
  kernel = entry;
  threadgroup_number = 0;
  arguments.clear();
  for (const Buffer& buffer : buffers) arguments.push_back((void*)buffer.start);
  make_fibers(threads);
  for (uint y = 0; y < grid_y; ++y) {
    for (uint x = 0; x < grid_x; ++x) {
      threadgroup_number += 1;
      for (uint i = 0; i < threads; ++i) {
        fibers[i].lane = {{i, 0, 0}, {x, y, 0}, i % SIMD, i / SIMD};
        fibers[i].state = READY;
      }
      if (!run_threadgroup()) return;
    }
  }
  for (const Buffer& buffer : buffers) {
    if (buffer.output && buffer.written != buffer.bytes) {
      report("%lu of %lu bytes of '%s' were never written", buffer.bytes - buffer.written, buffer.bytes,
             buffer.name.c_str());
    }
  }
}

void emulator_barrier() { wait(AT_BARRIER, __builtin_return_address(0)); }

uint emulator_prefix_sum(uint value) {
  running->value = value;
  wait(AT_PREFIX, __builtin_return_address(0));
  return uint(running->value);
}

float emulator_shuffle_xor(float value, uint mask) {
  running->value = as_type<uint>(value);
  running->mask = mask;
  wait(AT_SHUFFLE, __builtin_return_address(0));
  return as_type<float>(uint(running->value));
}

uint emulator_broadcast(uint value, uint lane) {
  running->value = value;
  running->mask = lane;
  wait(AT_BROADCAST, __builtin_return_address(0));
  return uint(running->value);
}

void emulator_multiply_tile(const float* a, const float* b, float* c) {
  memcpy(running->a, a, sizeof running->a);
  memcpy(running->b, b, sizeof running->b);
  memcpy(running->c, c, sizeof running->c);
  wait(AT_TILE, __builtin_return_address(0));
  memcpy(c, running->c, sizeof running->c);
}

void emulator_share_tiles(ushort* row, bool transposed) {
  memcpy(running->row, row, sizeof running->row);
  wait(transposed ? AT_COLUMNS : AT_ROWS, __builtin_return_address(0));
  memcpy(row, running->row, sizeof running->row);
}
}
