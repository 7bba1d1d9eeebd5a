// What spqt_cli/fit calls, on NumPy arrays: error-compensating rounding, and the way back through a layer.
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

// Slopes of y = x @ w, band beside band; written in place. dy (rows, bands * band): those by y; x (rows, inputs);
// w (bands, inputs, band); dx (rows, inputs): those by x; dots (bands, inputs, band / group_size): sums over rows and a
// group's outputs of x * dy * w. Alone, the caller computes everything itself: several may, each on its own thread.
void slopes(
    Numbers<const float, 2> dy,
    Numbers<const float, 2> x,
    Numbers<const float, 3> w,
    int group_size,
    bool alone,
    Numbers<float, 2> dx,
    Numbers<float, 3> dots);

}  // namespace spqt
