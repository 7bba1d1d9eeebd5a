// Runs the lanes of one threadgroup as fibers, in lockstep at barriers and simdgroup operations, and
// looks at every memory access: bounds, alignment, reads before writes, races, 128-byte lines.
// The calls come from g++ -fsanitize=thread in the kernel's own object; this file is not instrumented.
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <string>
#include <vector>

#include "shim_cpu.h"
#undef device
#undef constant

namespace {

constexpr uint64_t LINE = 128;         // bytes, an Apple GPU's cache line
constexpr uint64_t PAGE = 4096;        // guard bytes on both sides of a buffer
constexpr uint64_t ARENA = 1ull << 34; // address space, not memory
constexpr uint64_t STACK = 96 << 10;   // bytes of a lane
constexpr uint SIMD = 32;
constexpr size_t REPORTS = 20;
constexpr size_t ALIKE = 12, REPORTS_ALIKE = 4;  // leading characters that make reports alike

struct Buffer {
  std::string name;
  uint64_t start, bytes;
  bool output;
  std::vector<uint> line_reader;   // last threadgroup (from 1) that read the line
  std::vector<uint> byte_writer;   // thread of the grid (from 1) that wrote the byte, outputs only
  uint64_t lines = 0, lines_summed = 0, written = 0;
};

struct Word {  // 2 bytes of threadgroup memory
  uint epoch_written = 0, writer = 0, epoch_read = 0, reader = 0;
  bool several_readers = false, initialised = false;
};

struct Array {
  uint64_t start, bytes;
  std::vector<Word> words;
};

enum State { READY, AT_BARRIER, AT_PREFIX, AT_SHUFFLE, FINISHED };

struct Fiber {
  jmp_buf point;
  ucontext_t context;
  bool started = false;
  State state = READY;
  void* site = nullptr;
  uint64_t value = 0;
  uint mask = 0;
  Lane lane;
};

uint8_t* arena = nullptr;
uint64_t arena_used = 0;
std::vector<Buffer> buffers;
std::vector<int> page_buffer;  // which buffer a page of the arena belongs to, or -1
std::vector<Array> arrays;
std::vector<Fiber> fibers;
std::vector<std::string> reports;
std::vector<void*> arguments;
uint8_t* stacks = nullptr;
uint64_t stacks_bytes = 0;
ucontext_t scheduler_context;
jmp_buf scheduler;
Fiber* running = nullptr;
uint epoch = 0, threadgroup_number = 0;
void (*kernel)(void**) = nullptr;

__attribute__((format(printf, 1, 2))) void report(const char* format, ...) {
  if (reports.size() >= REPORTS) return;
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  std::string line = text;
  if (running) {
    const Lane& lane = running->lane;
    snprintf(text, sizeof text, " (lane %u of threadgroup %u,%u)", lane.thread_position_in_threadgroup.x,
             lane.threadgroup_position_in_grid.x, lane.threadgroup_position_in_grid.y);
    line += text;
  }
  size_t alike = 0;  // one fault met by every lane must not hide the others
  for (const std::string& known : reports) {
    if (known == line) return;
    alike += known.compare(0, ALIKE, line, 0, ALIKE) == 0;
  }
  if (alike >= REPORTS_ALIKE) return;
  reports.push_back(line);
}

uint me() { return running->lane.thread_position_in_threadgroup.x + 1; }

void touch_output(Buffer& buffer, uint64_t offset, uint64_t size, bool write) {
  const uint thread = (threadgroup_number - 1) * 1024 + me();
  for (uint64_t i = offset; i < offset + size; ++i) {
    uint& writer = buffer.byte_writer[i];
    if (!write && !writer) {
      report("uninitialised read of '%s' at byte %lu", buffer.name.c_str(), i);
      return;
    }
    if (write && writer && writer != thread) {
      report("two threads write '%s' at byte %lu", buffer.name.c_str(), i);
      return;
    }
    if (write && !writer) buffer.written += 1;
    if (write) writer = thread;
  }
}

void touch_device(uint64_t address, uint64_t size, bool write) {
  const uint64_t at = address - uint64_t(arena);
  const int index = at / PAGE < page_buffer.size() ? page_buffer[at / PAGE] : -1;
  const char* verb = write ? "write" : "read";
  if (index < 0) {
    report("out of bounds: %s of %lu bytes outside every buffer", verb, size);
    return;
  }
  Buffer& buffer = buffers[index];
  const int64_t offset = int64_t(address - buffer.start);
  if (offset < 0 || uint64_t(offset) + size > buffer.bytes) {
    report("out of bounds: %s of %lu bytes at byte %ld of '%s', which has %lu", verb, size, offset,
           buffer.name.c_str(), buffer.bytes);
    return;
  }
  if (size <= 16 && (size & (size - 1)) == 0 && address % size) {
    report("misaligned: %s of %lu bytes at byte %ld of '%s'", verb, size, offset, buffer.name.c_str());
  }
  if (buffer.output) {
    touch_output(buffer, offset, size, write);
  } else if (write) {
    report("write to the input '%s' at byte %ld", buffer.name.c_str(), offset);
  }
  if (write) return;
  for (uint64_t line = offset / LINE; line <= (offset + size - 1) / LINE; ++line) {
    uint& reader = buffer.line_reader[line];
    if (reader == threadgroup_number) continue;
    buffer.lines += reader == 0;
    buffer.lines_summed += 1;
    reader = threadgroup_number;
  }
}

void touch_threadgroup(Array& array, uint64_t address, uint64_t size, bool write) {
  for (uint64_t w = (address - array.start) / 2; w <= (address + size - 1 - array.start) / 2; ++w) {
    Word& word = array.words[w];
    const bool written_now = word.epoch_written == epoch && word.writer != me();
    const bool read_now = word.epoch_read == epoch && (word.several_readers || word.reader != me());
    if (written_now || (write && read_now)) {
      report("race: two lanes touch byte %lu of a threadgroup array between barriers", 2 * w);
    }
    if (!write && !word.initialised) report("uninitialised read of byte %lu of a threadgroup array", 2 * w);
    if (write) {
      word.epoch_written = epoch;
      word.writer = me();
      word.initialised = true;
    } else {
      word.several_readers = word.epoch_read == epoch && (word.several_readers || word.reader != me());
      word.epoch_read = epoch;
      word.reader = me();
    }
  }
}

inline void touch(const void* pointer, uint64_t size, bool write) {
  if (!running) return;
  const uint64_t address = uint64_t(pointer);
  if (address - uint64_t(arena) < ARENA) {
    touch_device(address, size, write);
    return;
  }
  for (Array& array : arrays) {
    if (address - array.start < array.bytes) {
      touch_threadgroup(array, address, size, write);
      return;
    }
  }  // else the lane's own stack
}

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
  fiber.state = READY;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  running = nullptr;
}

// All lanes of a simdgroup stand at one operation: give each its result. False where they don't.
bool exchange(Fiber* lanes) {
  const State state = lanes[0].state;
  if (state != AT_PREFIX && state != AT_SHUFFLE) return false;
  for (uint i = 1; i < SIMD; ++i) {
    if (lanes[i].state != state || lanes[i].site != lanes[0].site) return false;
  }
  uint64_t results[SIMD];
  uint sum = 0;
  for (uint i = 0; i < SIMD; ++i) {
    results[i] = state == AT_PREFIX ? sum : lanes[(i ^ lanes[i].mask) % SIMD].value;
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

void emulator_reset() {
  if (!arena) {
    arena = (uint8_t*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  } else {
    madvise(arena, arena_used, MADV_DONTNEED);
  }
  arena_used = PAGE;
  buffers.clear();
  page_buffer.assign(1, -1);
  arrays.clear();
  reports.clear();
  arguments.clear();
}

// A buffer of its own pages, ending `PAGE` bytes or more before the next; returns where to put its bytes.
void* emulator_buffer(const char* name, uint64_t bytes, int output) {
  Buffer buffer;
  buffer.name = name;
  buffer.start = uint64_t(arena) + arena_used;
  buffer.bytes = bytes;
  buffer.output = output;
  buffer.line_reader.assign((bytes + LINE - 1) / LINE, 0);
  if (output) {
    buffer.byte_writer.assign(bytes, 0);
    memset((void*)buffer.start, 0xAB, bytes);
  }
  const uint64_t pages = (bytes + PAGE - 1) / PAGE + 1;
  page_buffer.resize(page_buffer.size() + pages, int(buffers.size()));
  arena_used += pages * PAGE;
  arguments.push_back((void*)buffer.start);
  buffers.push_back(std::move(buffer));
  return arguments.back();
}

void emulator_run(void (*entry)(void**), uint grid_x, uint grid_y, uint threads) {
  kernel = entry;
  threadgroup_number = 0;
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

uint emulator_reports() { return reports.size(); }
const char* emulator_report(uint index) { return reports[index].c_str(); }
// what: 0 distinct lines read, 1 the sum over threadgroups of those distinct within each, 2 bytes written
uint64_t emulator_traffic(uint buffer, uint what) {
  const Buffer& b = buffers[buffer];
  return what == 0 ? b.lines : what == 1 ? b.lines_summed : b.written;
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

uint64_t emulator_index(const void* array, uint64_t elements, uint64_t size, uint64_t index) {
  bool known = false;
  for (const Array& one : arrays) known |= one.start == uint64_t(array);
  if (!known) {
    arrays.push_back({uint64_t(array), elements * size, std::vector<Word>((elements * size + 1) / 2)});
    memset((void*)array, 0xAB, elements * size);
  }
  if (index < elements) return index;
  report("out of bounds: index %ld of a threadgroup array of %lu", int64_t(index), elements);
  return 0;
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read1(void* p) { touch(p, 1, false); }
void __tsan_read2(void* p) { touch(p, 2, false); }
void __tsan_read4(void* p) { touch(p, 4, false); }
void __tsan_read8(void* p) { touch(p, 8, false); }
void __tsan_read16(void* p) { touch(p, 16, false); }
void __tsan_write1(void* p) { touch(p, 1, true); }
void __tsan_write2(void* p) { touch(p, 2, true); }
void __tsan_write4(void* p) { touch(p, 4, true); }
void __tsan_write8(void* p) { touch(p, 8, true); }
void __tsan_write16(void* p) { touch(p, 16, true); }
void __tsan_unaligned_read2(void* p) { touch(p, 2, false); }
void __tsan_unaligned_read4(void* p) { touch(p, 4, false); }
void __tsan_unaligned_read8(void* p) { touch(p, 8, false); }
void __tsan_unaligned_read16(void* p) { touch(p, 16, false); }
void __tsan_unaligned_write2(void* p) { touch(p, 2, true); }
void __tsan_unaligned_write4(void* p) { touch(p, 4, true); }
void __tsan_unaligned_write8(void* p) { touch(p, 8, true); }
void __tsan_unaligned_write16(void* p) { touch(p, 16, true); }
void __tsan_read_range(void* p, uint64_t size) { touch(p, size, false); }
void __tsan_write_range(void* p, uint64_t size) { touch(p, size, true); }
void __tsan_vptr_update(void** p, void*) { touch(p, 8, true); }
}
