"""Codes multiplied as the subnormal floats that their bits are: cpu/subnormal.h.

Contract: not one bit of a product differs from that of converted codes, for any bits, group, type of scales
and x; it is done where it may be (counted), and where u would leave the range codes are converted.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.format import layout

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa", "measured")]

INPUTS, OUTPUTS = 300, 320


@pytest.fixture
def measured():
    """What a test asked for is taken back."""
    yield
    cpu._native().use_subnormals(None)


class Layer:
    """A Zigzag matrix of random codes."""

    def __init__(self, bits=4, group=64, dtype=mx.float16, scale=0.01, outputs=OUTPUTS, inputs=INPUTS):
        random = np.random.default_rng(bits * 1000 + group)
        codes, scales = layout.packed_shapes((outputs, inputs), bits, group, layout.band_of(outputs, group))
        self.weight = mx.array(random.integers(0, 2**32, codes, dtype=np.uint32))
        self.scales = mx.array(random.uniform(0.5, 1, scales) * scale).astype(dtype)
        self.biases = mx.array(random.uniform(-8, 0, scales) * scale).astype(dtype)
        self.outputs, self.bits, self.group_size, self.threshold = outputs, bits, group, None

    def get(self, key, default=None):
        return getattr(self, key, default)

    __getitem__ = get


def x_of(seed=0, inputs=INPUTS):
    return np.random.default_rng(seed).normal(size=inputs).astype(np.float32)


def product(layer, x, wish):
    """y as bits, and how many tiles took subnormal numbers."""
    native = cpu._native()
    native.use_subnormals(wish)
    before = native.subnormal_tiles()
    ((y,), _) = cpu.sparse_gemv(mx.array(x)[None], [layer])
    mx.eval(y)
    return np.array(y).view(np.uint32), native.subnormal_tiles() - before


def same(layer, x, *, taken=True):
    converted, none = product(layer, x, False)
    raised, tiles = product(layer, x, True)
    assert none == 0
    assert (tiles > 0) == taken
    np.testing.assert_array_equal(raised, converted)
    return raised.view(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_no_bit_differs(bits, group, dtype):
    outputs = OUTPUTS + 64 * (group == 128)
    y = same(Layer(bits, group, dtype, outputs=outputs), x_of())
    assert np.isfinite(y).all()
    assert (y != 0).any()


@pytest.mark.parametrize("factor", [1e-20, 2.0**-15, 2.0**-16, 1e-3, 1e5, 1e20, 2.0**86])
def test_x_of_any_size(factor):
    y = same(Layer(), x_of() * np.float32(factor))
    assert (y != 0).any()


@pytest.mark.parametrize("factor", [1e-25, 2.0**90, 2.0**120])
def test_x_that_can_not_be_raised(factor):
    same(Layer(), x_of() * np.float32(factor), taken=False)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(("scale", "taken"), [(1e-15, True), (1e-33, False), (1e3, True), (1e12, False)])
def test_scales_of_any_size(dtype, scale, taken):
    """x is raised to below 2^111, so scales of 2^17 and more leave the range, and so do those below 2^-88."""
    same(Layer(dtype=dtype, scale=scale), x_of(), taken=taken)


def test_the_least_and_the_largest_float16():
    layer, x = Layer(), x_of()
    x[3] = np.abs(x).max() * np.float32(2.0**-60)
    scales = np.array(layer.scales)
    scales[:, ::3], scales[:, 1::3] = 2.0**-24, 65504
    layer.scales = mx.array(scales)
    same(layer, x)


def test_one_x_too_small_beside_the_largest():
    x = x_of()
    x[7] = np.abs(x).max() * np.float32(2.0**-70)
    same(Layer(), x, taken=False)


def test_zeros_and_skipped_channels():
    x = x_of()
    x[::2] = 0
    same(Layer(), x)
    layer = Layer()
    layer.threshold = mx.array([0.7])
    same(layer, x_of())
    assert not same(Layer(), np.zeros(INPUTS, np.float32), taken=False).any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_comes_through(value):
    x = x_of()
    x[5] = value
    converted, _ = product(Layer(), x, False)
    raised, _ = product(Layer(), x, True)
    assert not np.isfinite(raised.view(np.float32)).any()
    np.testing.assert_array_equal(raised.view(np.float32), converted.view(np.float32))


def test_scales_that_are_not_finite_come_through():
    for dtype in (mx.float16, mx.bfloat16):
        layer = Layer(dtype=dtype)
        scales = np.array(layer.scales.astype(mx.float32))
        scales[0, 5, 1], scales[0, 9, 2] = np.inf, np.nan
        layer.scales = mx.array(scales).astype(dtype)
        converted, _ = product(layer, x_of(), False)
        raised, _ = product(layer, x_of(), True)
        np.testing.assert_array_equal(raised.view(np.float32), converted.view(np.float32))


def test_a_row_is_the_same_beside_others():
    layer, rows = Layer(), np.stack([x_of(seed) for seed in range(3)])
    together, _ = cpu.sparse_rows(mx.array(rows)[:, None], [layer])
    for row, y in zip(rows, np.array(together[0]), strict=True):
        alone, tiles = product(layer, row, True)
        assert tiles
        np.testing.assert_array_equal(y.reshape(1, -1).view(np.uint32), alone)


def test_the_choice_is_measured_and_lasts():
    """Either all tiles of a product take them or none, and the next one does likewise."""
    first, again = (product(Layer(), x_of(), None)[1] for _ in range(2))
    assert first == again
