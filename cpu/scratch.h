// Memory that a job needs while it runs, kept from one to the next.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>

// Whether SPQT_POISON is set, as it is while tests run.
extern const bool poisoned;

// Fills memory about to be used with NaN if that is set, so that what is read unwritten shows.
inline void poison(void* memory, size_t bytes) {
  if (poisoned && bytes) std::memset(memory, 0xff, bytes);
}

class Scratch {
 public:
  Scratch() = default;
  Scratch(std::shared_ptr<float[]> data, size_t floats) : data_(std::move(data)), floats_(floats) {}

  float* get() const { return data_.get(); }  // where it will be: until the job starts another may use it
  void start() const { poison(get(), floats_ * sizeof(float)); }  // every job calls it first

 private:
  std::shared_ptr<float[]> data_;
  size_t floats_ = 0;
};

enum Purpose : int { PARTIALS, BETWEEN };  // within a product; from one product of an operation to the next

// At least `floats` floats for a job of the stream: jobs of one stream run one after another, so they share
// one block for each purpose. Asked for when the graph is evaluated, where running out of memory may still raise.
Scratch scratch(int stream, Purpose purpose, size_t floats);

// The calling thread's own floats, kernels.h says how many; another task's before, so of no known values.
float* thread_work();
