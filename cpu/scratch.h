// Memory that a job needs while it runs, kept from one to the next.
#pragma once

#include <cstddef>
#include <memory>

enum Purpose : int { PARTIALS, BETWEEN };  // within a product; from one product of an operation to the next

// At least `floats` floats for a job of the stream: jobs of one stream run one after another, so they share
// one block for each purpose. Asked for when the graph is evaluated, where running out of memory may still raise.
std::shared_ptr<float[]> scratch(int stream, Purpose purpose, size_t floats);

// The calling thread's own floats, kernels.h says how many.
float* thread_work();
