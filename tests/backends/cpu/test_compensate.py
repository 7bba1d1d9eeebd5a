"""Error-compensating rounding on the CPU extension against its definition, `fit.compensate`.

Within one span of channels every sum has one order, so results are equal bit for bit. Longer ones differ by
float32 roundings that tip codes over: there the errors are compared.
"""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.fit import compensate
from spqt_cli.format import layout

USABLE, REASON = cpu.status()
pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def problem(inputs, columns, seed=0):
    """A target and a factor whose channels depend on each other about as a layer's do."""
    rng = np.random.default_rng(seed)
    factor = np.triu(rng.normal(size=(inputs, inputs)) * 0.5 / np.sqrt(inputs), 1).astype(np.float32)
    factor.flat[:: inputs + 1] = 1
    target = (rng.standard_t(5, size=(inputs, columns)) * 0.05).astype(np.float32)
    target[:, 0] = 0
    return target, factor


@cache
def definition(inputs, columns, bits, group_size, dtype):
    return compensate.compensate(*problem(inputs, columns), bits, group_size, dtype)


def equal(some, others):
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def loss(target, factor, found, group_size):
    """Sum of squares of what was left to each channel when its turn came."""
    codes, scales, biases = (part.astype(np.float64) for part in found)
    values = codes * scales.repeat(group_size, 1) + biases.repeat(group_size, 1)
    return np.square(factor.T.astype(np.float64) @ (target - values)).sum()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).rpartition(".")[2])
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_is_the_definition(bits, group_size, dtype):
    inputs, columns = (64, group_size) if bits in (2, 5) else (1, 2 * group_size)
    target, factor = problem(inputs, columns)
    before = target.copy()
    found = cpu.compensate(target, factor, bits, group_size, dtype)
    assert equal(found, definition(inputs, columns, bits, group_size, dtype))
    assert np.array_equal(before, target)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("inputs", [65, 200])
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
def test_is_the_definition_over_many_spans(inputs, group_size):
    target, factor = problem(inputs, 3 * group_size)
    arguments = target, factor, 4, group_size, mx.float16
    ours, theirs = cpu.compensate(*arguments), definition(inputs, 3 * group_size, *arguments[2:])
    assert (ours[0][:64] == theirs[0][:64]).all()
    assert (ours[0] == theirs[0]).mean() > 0.95
    of_ours, of_theirs = (loss(target, factor, found, group_size) for found in (ours, theirs))
    assert of_ours == pytest.approx(of_theirs, rel=0.02)
    assert equal(ours, cpu.compensate(*arguments))


@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
def test_same_bits_for_any_threads_and_instruction_set(group_size):
    arguments = (*problem(300, 4 * group_size), 3, group_size, mx.bfloat16)
    native, count, isa = cpu._native(), cpu.threads(), cpu._native().isa()
    want = cpu.compensate(*arguments)
    try:
        for name in cpu.isas():
            for threads in (1, 2, 5):
                native.use_isa(name)
                cpu.set_threads(threads)
                assert equal(cpu.compensate(*arguments), want)
    finally:
        native.use_isa(isa)
        cpu.set_threads(count)


def test_values_that_fit_no_half():
    target, factor = problem(10, 64)
    target[3] = np.linspace(-1e6, 1e6, 64)
    codes, scales, biases = cpu.compensate(target, factor, 4, 64, mx.float16)
    assert not np.isfinite(scales[3] + biases[3]).any()
    assert codes.max() <= 15


def test_shapes_that_do_not_fit_are_refused():
    target, factor = problem(10, 64)
    for arguments in (
        (target, factor[:9], 4, 64, mx.float16),
        (target, factor, 7, 64, mx.float16),
        (target, factor, 4, 16, mx.float16),
    ):
        with pytest.raises(ValueError, match="must be"):
            cpu.compensate(*arguments)
