"""y @ W, by which gradients go back through a frozen layer: each backend against float64."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from spqt_cli.backends import cpu, stock
from spqt_cli.decode import hooks
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout
from tests.lib import numpy_backend

BACKENDS = {"stock": stock, "numpy": numpy_backend} | ({"cpu": cpu} if cpu.status()[0] else {})
# (outputs, inputs, band): one band; several; the last one not full
SHAPES = [(128, 96, 128), (512, 33, 128), (200, 64, 128)]


def zigzag(outputs, inputs, band, bits, group_size, dtype=mx.float32):
    mx.random.seed(bits)
    w = mx.random.normal((outputs, inputs))
    layer = ZigzagLinear(outputs, bits, group_size, band)
    layer.weight, layer.scales, layer.biases = layout.quantize(w.astype(dtype), bits, group_size, band)
    layer.bias = mx.ones((outputs,))  # of the product, not of its gradient
    return layer


def assert_product(found, y, w):
    expected = np.array(y, np.float64) @ np.array(w.astype(mx.float32), np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_go_back(backend, bits, shape):
    layer = zigzag(*shape, bits, 64 if bits % 2 else 32)
    for lead in ((5,), (2, 3), (1, 1)):
        y = mx.random.normal((*lead, shape[0]))
        found = BACKENDS[backend].matmul_transposed(y, layer)
        assert_product(found, y, layer.dequantized())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension alone reads 16-bit scales as they are")
def test_sixteen_bit_scales():
    layer = zigzag(200, 64, 128, 4, 64, mx.bfloat16)
    y = mx.random.normal((2, 3, 200))
    w = layout.dequantize(
        layer.weight, *(layer[name].astype(mx.float32) for name in ("scales", "biases")),
        outputs=200, bits=4, group_size=64,
    )  # fmt: skip
    assert_product(cpu.matmul_transposed(y, layer), y, w)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU extension's")
@pytest.mark.parametrize("bits", layout.BITS)
def test_row_grouped_matrices_go_back(bits):
    packed = layout.quantize_rows(mx.random.normal((130, 192)), bits, 64)
    for lead in ((2, 5), (1, 1)):
        y = mx.random.normal((*lead, 130))
        found = cpu.head_matmul_transposed(y, *packed, bits, 64)
        assert_product(found, y, mx.dequantize(*packed, 64, bits))


@pytest.mark.parametrize("rows", [True, False])
def test_scales_and_biases_have_slopes_too(rows):
    """A frozen layer's are not asked for by mlx-lm's trainers, but may be by a loop of one's own."""
    hooks.install()
    layer = zigzag(200, 64, 128, 4, 32)
    if rows:
        layer = nn.QuantizedLinear(64, 200, group_size=32, bits=4)
    x = mx.random.normal((3, 5, 64))

    def loss(arrays):
        x, layer.scales, layer.biases = arrays
        return (layer(x) ** 2).sum()

    def definition(arrays):
        x, scales, biases = arrays
        if rows:
            y = mx.quantized_matmul(x, layer.weight, scales, biases, group_size=32, bits=4)
        else:
            y = layout.matmul(x, layer.weight, scales, biases, outputs=200, bits=4, group_size=32)
        return ((y + layer.bias) ** 2).sum()

    arrays = [x, layer.scales, layer.biases]
    for found, expected in zip(mx.grad(loss)(arrays), mx.grad(definition)(arrays), strict=True):
        assert mx.abs(expected).max() > 1
        assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5 * mx.abs(expected).max().item())
