// The books of an emulated launch: buffers and threadgroup arrays, and every access to them held against
// bounds, alignment, reads before writes, races and 128-byte lines. The calls come from
// g++ -fsanitize=thread in the kernel's own object; runtime.cpp says which lane acts.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <string>
#include <vector>

#include "shim_cpu.h"
#undef device
#undef constant
#undef threadgroup

namespace {

constexpr uint64_t LINE = 128;         // bytes, an Apple GPU's cache line
constexpr uint64_t PAGE = 4096;        // guard bytes on both sides of a buffer
constexpr uint64_t ARENA = 1ull << 34; // address space, not memory
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

uint8_t* arena = nullptr;
uint64_t arena_used = 0;
std::vector<Buffer> buffers;
std::vector<int> page_buffer;  // which buffer a page of the arena belongs to, or -1
std::vector<Array> arrays;
std::vector<std::string> reports;
const Lane* acting = nullptr;  // the lane that runs now
uint epoch = 0;                // counts barriers
uint threadgroup_number = 0;   // from 1

__attribute__((format(printf, 1, 2))) void report(const char* format, ...) {
  if (reports.size() >= REPORTS) return;
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  std::string line = text;
  if (acting) {
    snprintf(text, sizeof text, " (lane %u of threadgroup %u,%u)", acting->thread_position_in_threadgroup.x,
             acting->threadgroup_position_in_grid.x, acting->threadgroup_position_in_grid.y);
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

uint me() { return acting->thread_position_in_threadgroup.x + 1; }

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
  if (!acting) return;
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

}  // namespace

extern "C" {

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
  buffers.push_back(std::move(buffer));
  return (void*)buffers.back().start;
}

uint emulator_reports() { return reports.size(); }
const char* emulator_report(uint index) { return reports[index].c_str(); }
// what: 0 distinct lines read, 1 the sum over threadgroups of those distinct within each, 2 bytes written
uint64_t emulator_traffic(uint buffer, uint what) {
  const Buffer& b = buffers[buffer];
  return what == 0 ? b.lines : what == 1 ? b.lines_summed : b.written;
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
