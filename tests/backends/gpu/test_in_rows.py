"""Custom kernels get arrays whose elements lie in rows, and MLX makes no copies of its own on Metal.

Contract: whatever strides x, experts' indices, a residual stream, a position's numbers and counts come with,
every input of every launch is row-contiguous, and results are those of the same values in rows; on Metal MLX
is told not to copy (mlx issue 3347), on CUDA it may.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import interface, problems
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import experts, first_use, kernel_text, rows, tiles
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from tests.backends.gpu.test_kernels import CUTS, use
from tests.backends.gpu.test_rows import CUTS as ROWS_CUTS
from tests.metal.emulator import emulate


@pytest.fixture
def on_metal(monkeypatch):
    """Launches as on Metal, emulated; returns the number of inputs seen. None may be strided."""
    seen = []

    def run(launch, inputs):
        mx.eval(inputs)
        for name, array in zip(launch.kernel.inputs, inputs, strict=True):
            assert memoryview(array).c_contiguous, f"{name} of {launch.kernel.name}"
            seen.append(name)
        return emulate(launch, inputs).outputs

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "best", lambda *_: "")  # nothing is timed
    for name in ("verdict", "rows_verdict", "experts_verdict", "whole_verdict"):
        monkeypatch.setattr(first_use, name, lambda *_, **__: "")
    mx.disable_compile()  # a traced array has no bytes that an emulator could read
    yield seen
    mx.enable_compile()


def strided(array):
    """The same values with gaps between them."""
    wide = mx.stack([array, array + 1], axis=-1)
    found = wide[..., 0]
    mx.eval(found)
    assert not memoryview(found).c_contiguous
    return found


def same(found, expected):
    return all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cut", ["wide", "narrow"])  # with stripes, and without
def test_one_row(on_metal, monkeypatch, cut):
    use(monkeypatch, CUTS[cut])
    case = Case((128, 128), 301)
    x, some = problems.vector(case), problems.matrices(case)
    counted = mx.array([5, 7], mx.uint32)
    expected, counts = gpu.prepare(some)(x, counted)
    found, again = gpu.prepare(some)(strided(x), strided(counted))
    assert same([*found, again], [*expected, counts])
    assert {"x", "settings", "packed"} <= set(on_metal)


def test_what_reductions_take_besides(on_metal):
    case = Case((256, 128, 128), 301)
    x, some = problems.vector(case), problems.matrices(case)
    turn = interface.Rotary(64, 64, traditional=False, rotated=2)
    turns, residual = mx.random.uniform(-1.0, 1.0, (64,)), mx.random.normal((1, 1, 256)).astype(mx.float16)
    for layers, then, other in ((some, turn, turns), (some[:1], "residual", residual)):
        form = launching.Form(then=then)
        plan = launching.make_plan(x.shape, x.dtype, layers, CUTS["wide"], form)
        expected, _ = launching.launch(x, plan, plan.nothing, other)
        found, _ = launching.launch(strided(x), plan, plan.nothing, strided(other))
        assert same(found, expected)
    assert {"turns", "residual"} <= set(on_metal)


def test_more_rows(on_metal):
    case = Case((128,), 96)
    x, some = problems.rows(case, 3), problems.matrices(case)
    plan = rows.make_plan(x.dtype, some, ROWS_CUTS["four"], dense=False)
    expected, counts = rows.launch(x, plan)
    found, again = rows.launch(strided(x), plan)
    assert same([*found, again], [*expected, counts])


def test_chosen_experts(on_metal):
    case = Case((128,), 96)
    _, stacks = problems.experts(case, 3)
    x, chosen = problems.rows(case, 4), mx.array([2, 0, 1, 1, 0, 2, 2, 1], mx.uint32)
    plan = experts.make_plan(x.dtype, stacks, CUTS["narrow"]._replace(stripe=96), 8, 2)
    expected, counts = experts.launch(x, chosen, plan)
    found, again = experts.launch(strided(x), strided(chosen), plan)
    assert same([*found, again], [*expected, counts])


@pytest.mark.parametrize("kind", ["metal", "cuda"])
def test_mlx_copies_inputs_on_cuda_alone(monkeypatch, kind):
    told = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: kind == "metal")
    for kernel in ("metal_kernel", "cuda_kernel"):
        monkeypatch.setattr(mx.fast, kernel, lambda kernel=kernel, **how: told.append((kernel, how)))
    launching._built.__wrapped__(kernel_text.count_kernel())
    ((made, how),) = told
    assert made == f"{kind}_kernel"
    assert how["ensure_row_contiguous"] is (kind == "cuda")
