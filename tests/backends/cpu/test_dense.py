"""Prompts, heads and MLX's own layout on the CPU extension.

Contract: `cpu.matmul` of many rows and `cpu.head_matmul` are x @ W.T + bias, W as dequantized.
The reference is NumPy in float64. TOLERANCE: float32 roundings of either sign over 4,000 terms come to about
sqrt(4000) * 2^-24 = 4e-6 of the result's norm; 1e-5 is less than three times that.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.format import layout

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]

TOLERANCE = 1e-5  # float32 sums of a few thousand terms against float64


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def as_float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def close(y, want, tolerance=TOLERANCE):
    assert y.shape == want.shape
    assert np.linalg.norm(as_float64(y) - want) <= tolerance * np.linalg.norm(want)


class Layer(dict):
    """A random Zigzag projection and, as `matrix`, what it stands for."""

    def __init__(self, shape, bits=4, group_size=64, dtype=mx.float16, bias=False):
        super().__init__()
        self.outputs, self.bits, self.group_size = shape[0], bits, group_size
        packed = layout.quantize(
            random(*shape).astype(dtype), bits, group_size, layout.band_of(shape[0], group_size)
        )
        self.update(zip(("weight", "scales", "biases"), packed, strict=True))
        if bias:
            self["bias"] = random(shape[0], seed=7)

    @property
    def matrix(self):
        wide = (self["scales"].astype(mx.float32), self["biases"].astype(mx.float32))
        form = {"outputs": self.outputs, "bits": self.bits, "group_size": self.group_size}
        return as_float64(layout.dequantize(self["weight"], *wide, **form))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_format_many_rows(bits, group_size, dtype):
    layer, x = Layer((200, 100), bits, group_size, dtype, bias=True), random(2, 7, 100, seed=1)
    close(cpu.matmul(x, layer), as_float64(x) @ layer.matrix.T + as_float64(layer["bias"]))


@pytest.mark.parametrize("rows", [2, 5, 6, 7, 11, 12, 13, 256, 257, 300])
def test_row_tiles_not_full(rows):
    layer, x = Layer((100, 70), 4, 32), random(rows, 70, seed=1)
    close(cpu.matmul(x, layer), as_float64(x) @ layer.matrix.T)


@pytest.mark.parametrize("inputs", [1, 33, 255, 256, 257, 600])
def test_panels_not_full(inputs):
    layer, x = Layer((4100, inputs), 4, 64), random(3, inputs, seed=1)
    close(cpu.matmul(x, layer), as_float64(x) @ layer.matrix.T)


def test_no_rows():
    assert cpu.matmul(mx.zeros((0, 64)), Layer((96, 64))).shape == (0, 96)


def test_one_row_takes_the_vector_path():
    layer, x = Layer((96, 64), bias=True), random(1, 1, 64)
    (y,), _ = cpu._native().sparse_gemv(x, [cpu._packed(layer, None)])
    assert mx.array_equal(cpu.matmul(x, layer), y)


def test_half_precision_rows():
    layer, x = Layer((96, 64)), random(5, 64, seed=1).astype(mx.float16)
    y = cpu.matmul(x, layer)
    assert y.dtype == mx.float16
    close(y, as_float64(x) @ layer.matrix.T, 2e-3)  # y is rounded to 11 bits


def test_rows_do_not_depend_on_their_neighbours():
    layer, x = Layer((96, 300)), random(40, 300, seed=1)
    whole = cpu.matmul(x, layer)
    assert mx.array_equal(whole[13:29], cpu.matmul(x[13:29], layer))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bitwise_equal_for_any_thread_count(count):
    layer, x = Layer((700, 300)), random(280, 300, seed=1)
    head, v = mx.quantize(random(5000, 128), 64, 4), random(1, 128, seed=2)
    before = cpu.threads()
    want, want_head = cpu.matmul(x, layer), cpu.head_matmul(v, *head, 4, 64)
    mx.eval(want, want_head)
    cpu.set_threads(count)
    try:
        assert mx.array_equal(cpu.matmul(x, layer), want)
        assert mx.array_equal(cpu.head_matmul(v, *head, 4, 64), want_head)
    finally:
        cpu.set_threads(before)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_format_of_mlx_layout(bits, group_size, dtype):
    packed = mx.quantize(random(67, 640).astype(dtype), group_size, bits)
    wide = [a.astype(mx.float32) for a in packed[1:]]
    matrix = as_float64(mx.dequantize(packed[0], *wide, group_size=group_size, bits=bits))
    for rows in (1, 9):
        x = random(rows, 640, seed=rows)
        close(cpu.head_matmul(x, *packed, bits, group_size), as_float64(x) @ matrix.T)


@pytest.mark.parametrize("inputs", [32, 96, 160, 320])
def test_mlx_layout_columns_not_full(inputs):
    for bits in layout.BITS:
        packed = mx.quantize(random(5, inputs), 32, bits)
        matrix = as_float64(mx.dequantize(*packed, group_size=32, bits=bits))
        x = random(1, inputs, seed=3)
        close(cpu.head_matmul(x, *packed, bits, 32), as_float64(x) @ matrix.T)


def test_gradient_of_mlx_layout_is_mlx_own():
    packed, x = mx.quantize(random(96, 64), 64, 4), random(3, 64, seed=2)
    ours = mx.grad(lambda x: (cpu.head_matmul(x, *packed, 4, 64) ** 2).sum())(x)
    stock = mx.grad(lambda x: (mx.quantized_matmul(x, *packed, group_size=64, bits=4) ** 2).sum())(x)
    close(ours, as_float64(stock))


def test_wrong_width_raises():
    with pytest.raises(ValueError, match="channels"):
        cpu.head_matmul(mx.zeros((1, 65)), *mx.quantize(random(96, 64), 64, 4), 4, 64)
    with pytest.raises(ValueError, match="channels"):
        cpu.matmul(mx.zeros((2, 65)), Layer((96, 64)))
