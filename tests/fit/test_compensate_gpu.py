"""The GPU's version of error-compensating rounding against the definition, on whatever device runs."""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.fit import compensate, compensate_gpu


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), [(4, 64, mx.float16), (3, 32, mx.bfloat16), (8, 128, mx.float32)]
)
@pytest.mark.parametrize("inputs", [1, 64, 100])
def test_is_the_definition(inputs, bits, group_size, dtype):
    rng = np.random.default_rng(inputs)
    factor = np.triu(rng.normal(size=(inputs, inputs)) * 0.5 / np.sqrt(inputs), 1).astype(np.float32)
    factor.flat[:: inputs + 1] = 1
    target = (rng.standard_t(5, size=(inputs, 128)) * 0.05).astype(np.float32)
    target[:, 0] = 0
    ours, theirs = (
        version(target, factor, bits, group_size, dtype)
        for version in (compensate_gpu.compensate, compensate.compensate)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert (ours[0] == theirs[0]).mean() > 0.95
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (np.abs(one - other) <= 2e-3 * np.abs(other).max()).mean() > 0.95


def test_values_that_fit_no_half():
    target = np.linspace(-1e6, 1e6, 64, dtype=np.float32)[None]
    _, scales, biases = compensate_gpu.compensate(target, np.ones((1, 1), np.float32), 4, 64, mx.float16)
    assert not (np.isfinite(scales) & np.isfinite(biases)).any()
