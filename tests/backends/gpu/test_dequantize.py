"""dequantize.metal under emulation, and the products that go through it.

Contract: each weight is code * scale + bias, rounded once, for every width of code, group, dtype and shape;
two runs are equal bit for bit; the emulator reports no fault; a wrong kernel is never used.
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import accuracy, problems, stock
from spqt_cli.backends.gpu import dequantize, first_use, kernel_text, many
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from spqt_cli.format import layout
from tests.backends.gpu.test_first_use import fresh_trust, run_emulated
from tests.metal.emulator import emulate

__all__ = ["fresh_trust"]  # a fixture
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@pytest.fixture
def emulated(monkeypatch, fresh_trust):
    """Every launch goes through the emulator; a fault it sees fails the test. Returns the launches."""
    launches = []

    def run(launch, inputs):
        emulation = emulate(launch, inputs)
        assert emulation.reports == []
        launches.append(launch)
        return emulation.outputs

    monkeypatch.setattr(launching, "run", run)
    return launches


def assert_right(case):
    (matrix,) = problems.matrices(case)
    plan = dequantize.make_plan(case.dtype, matrix)
    first, second = dequantize.whole(plan), dequantize.whole(plan)
    assert first.shape[0] == case.inputs
    assert accuracy.judge_weights(matrix, first, second) == ""


@pytest.mark.parametrize("kind", list(itertools.product(layout.BITS, layout.GROUP_SIZES, DTYPES)), ids=str)
def test_every_width_of_code_group_and_dtype(emulated, kind):
    bits, group, dtype = kind
    assert_right(Case((260,), 23, bits, group, dtype))


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(4095, 6), (64, 1), (1, 70), (2752, 9), (2 * 8192 - 5, 3), (33, 4)]
)
def test_ragged_shapes(emulated, outputs, inputs):
    assert_right(Case((outputs,), inputs, group_size=32))


def test_scales_of_another_dtype(emulated):
    assert_right(Case((95,), 14, 4, 32, mx.bfloat16, scales=mx.float32))


def test_every_weight_is_within_one_rounding_of_mlx_s(emulated):
    """An oracle of another hand: mx.dequantize, which rounds code * scale to 16 bits before it adds."""
    (matrix,) = problems.matrices(Case((300,), 40))
    own = accuracy.wide(dequantize.whole(dequantize.make_plan(mx.float32, matrix)))[:, :300]
    packed = (matrix.weight, matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32))
    theirs = mx.dequantize(*packed, group_size=64, bits=4)
    theirs = accuracy.wide(theirs.swapaxes(0, 1).reshape(40, -1))[:, :300]
    assert np.max(np.abs(own - theirs)) <= 2.0**-22 * np.max(np.abs(theirs))


@pytest.mark.parametrize("outputs", [256, 250, 4100])
def test_products_of_padded_and_several_bands(emulated, outputs):
    case = Case((outputs,), 70, bias=True)
    (matrix,) = problems.matrices(case)
    matrix.set_threshold(0.0)
    x = problems.rows(case, 5).reshape(5, 1, 70)
    y = many._dequantized(x, matrix)
    assert y.shape == (5, 1, outputs)
    assert [launch.kernel.files[-1] for launch in emulated] == [
        "dequantize.metal"
    ] * 3  # two of them to check
    rows = x.reshape(1, 5, 70)
    found = ([y.reshape(1, 5, outputs)], mx.full((1, 5), 70, mx.uint32))
    assert accuracy.judge_rows(rows, [matrix], found, found, rounded=True).passed


def test_new_weights_are_not_missed_by_the_plan(emulated):
    first, second = (problems.matrices(Case((outputs,), 40))[0] for outputs in (128, 120))
    x = problems.rows(Case((128,), 40), 3)
    many._dequantized(x, first)
    first.weight, first.scales, first.biases = second.weight * 3, second.scales, second.biases
    expected = stock.matmul(x, first)
    assert mx.allclose(many._dequantized(x, first), expected, atol=0.1).item()


def test_a_wrong_kernel_is_never_used(monkeypatch, fresh_trust, capfd):
    monkeypatch.setattr(launching, "run", run_emulated)
    case = Case((128,), 40)
    (matrix,) = problems.matrices(case)
    x = problems.rows(case, 3)
    real = kernel_text.body
    old, new = "(c + 1) % OUTPUTS", "(c + 2) % OUTPUTS"
    assert old in real("dequantize.metal")
    monkeypatch.setattr(kernel_text, "body", lambda name: real(name).replace(old, new))
    for _ in range(2):
        assert mx.allclose(many._dequantized(x, matrix), stock.matmul(x, matrix), atol=0.1).item()
    assert capfd.readouterr().err.count("a GPU kernel is wrong") == 1
    assert first_use.refused()
