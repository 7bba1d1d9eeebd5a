// Error-compensating rounding: what spqt_cli/fit/gptq.py calls.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace spqt {

template <class T, int NDIM>
using Numbers = nanobind::ndarray<T, nanobind::ndim<NDIM>, nanobind::c_contig, nanobind::device::cpu>;

// Rounds all channels of all groups of outputs; NumPy arrays, written in place. errors (groups, inputs, group_size):
// the targets, and afterwards target - rounded; factor (inputs, inputs), unit upper triangular; codes as errors;
// scales, biases (groups, inputs), rounded to `type`: 0 float32, 1 float16, 2 bfloat16.
void compensate(
    Numbers<float, 3> errors,
    Numbers<const float, 2> factor,
    int bits,
    int type,
    Numbers<uint8_t, 3> codes,
    Numbers<float, 2> scales,
    Numbers<float, 2> biases);

}  // namespace spqt
