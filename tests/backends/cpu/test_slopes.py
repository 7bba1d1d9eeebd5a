"""The way back through a layer on the CPU extension against its definition in float64."""

import threading

import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.format import layout

USABLE, REASON = cpu.status()
pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

ROWS = (1, 5, 12, 13, 130)


def problem(rows, inputs, band, bands=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, bands * band), (rows, inputs), (bands, inputs, band)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def definition(dy, x, w, group_size):
    dy, x, w = (part.astype(np.float64) for part in (dy, x, w))
    bands, inputs, band = w.shape
    dy = dy.reshape(-1, bands, band)
    by_weights = np.einsum("ri,rbo->bio", x, dy) * w
    dots = by_weights.reshape(bands, inputs, -1, group_size).sum(-1)
    return np.einsum("rbo,bio->ri", dy, w), dots


def off(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


def same(some, others):
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [1, 32, 40, 577])
@pytest.mark.parametrize("bands", [1, 2])
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
def test_is_the_definition(group_size, bands, inputs, rows):
    arguments = *problem(rows, inputs, 2 * group_size, bands), group_size
    found = cpu.slopes(*arguments, alone=True)
    for ours, want in zip(found, definition(*arguments), strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == want.shape
        assert off(ours, want) < 1e-5
    assert same(found, cpu.slopes(*arguments, alone=False))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [960, 961, 2000])
def test_more_rows_than_fit_in_scratch(rows):
    arguments = *problem(rows, 40, 96), 32
    for ours, want in zip(cpu.slopes(*arguments, alone=True), definition(*arguments), strict=True):
        assert off(ours, want) < 1e-5


@pytest.mark.usefixtures("isa")
def test_same_bits_for_any_threads():
    arguments = *problem(130, 577, 192), 64
    want, count = cpu.slopes(*arguments, alone=True), cpu.threads()
    try:
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            assert same(cpu.slopes(*arguments, alone=False), want)
    finally:
        cpu.set_threads(count)


def test_several_callers_at_once():
    problems = [(*problem(50 + n, 100, 128, seed=n), 64) for n in range(4)]
    wants = [cpu.slopes(*arguments, alone=True) for arguments in problems]
    right = [0] * len(problems)

    def call(n):
        for _ in range(20):
            right[n] += same(cpu.slopes(*problems[n], alone=n % 2 == 0), wants[n])

    callers = [threading.Thread(target=call, args=(n,)) for n in range(len(problems))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [20] * len(problems)


def test_arguments_stay_as_they_are():
    arguments = problem(13, 40, 64)
    before = [part.copy() for part in arguments]
    cpu.slopes(*arguments, 64, alone=True)
    assert same(arguments, before)


@pytest.mark.parametrize("alone", [True, False])
def test_shapes_that_do_not_fit_are_refused(alone):
    dy, x, w = problem(10, 40, 64)
    for arguments in (
        (dy[:9], x, w, 64),
        (dy[:, :32], x, w, 64),
        (dy, x[:9], w, 64),
        (dy, x[:, :39], w, 64),
        (dy, x, w[:, :39], 64),
        (dy, x, w, 128),
        (dy, x, w, 16),
        (dy, x, w, 0),
        (dy, x, w, -32),
        (dy[:0], x[:0], w, 64),
        (dy, x, w[:0], 64),
        (dy, x[:, :0], w[:, :0], 64),
    ):
        with pytest.raises(ValueError, match="must be") as error:
            cpu.slopes(*arguments, alone=alone)
        assert "\n" not in str(error.value)


def test_arrays_of_other_dimensions_are_refused():
    dy, x, w = problem(10, 40, 64)
    for arguments in ((dy[0], x, w), (dy, x[0], w), (dy, x, w[0]), (dy[None], x, w)):
        with pytest.raises(ValueError, match="unpack"):
            cpu.slopes(*arguments, 64, alone=True)
