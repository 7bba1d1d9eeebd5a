"""The Metal bodies under emulation against float64: every variant, every hazard in the shapes."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from tests.emulator import emulate

from spqt_cli import geometry, gpu, gpu_text, layers, layout

ALL, HALF, NONE = 0.0, 0.6745, 99.0  # thresholds for x ~ N(0, 1)


@pytest.fixture
def emulated(monkeypatch):
    """Every launch goes through the emulator; a fault it sees fails the test. Returns the traffic."""
    traffic = []

    def run(launch, inputs):
        emulation = emulate(launch, inputs, gpu_text.header())
        assert emulation.reports == []
        traffic.append(emulation.traffic)
        return emulation.outputs

    monkeypatch.setattr(gpu, "run", run)
    return traffic


def use(monkeypatch, cut):
    monkeypatch.setattr(geometry, "choose", lambda *_: cut)


def make_layer(outputs, inputs, *, bits=4, group=64, dtype=mx.float16, threshold=HALF, bias=False, band=None):
    linear = layers.nn.Linear(inputs, outputs, bias=bias)
    linear.set_dtype(dtype)
    entry = {"band": band or layout.band_of(outputs, group), "threshold": threshold}
    layer = layers.ZigzagLinear.from_linear(linear, group, bits, spqt=entry)
    mx.eval(layer.parameters())
    return layer


def wide(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weights(layer):
    """The float64 matrix that codes, scales and biases stand for, not rounded to their dtype."""
    packed = (layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32))
    w = layout.dequantize(*packed, outputs=layer.outputs, bits=layer.bits, group_size=layer.group_size)
    return wide(w)


def check(x, layer, y, active):
    """y against float64 within the bound that metal/README.md derives, and the count exactly."""
    kept = ~np.array(layout.inactive(x, layer.threshold)).ravel()
    values = np.where(kept, wide(x).ravel(), 0.0)
    bias = wide(layer.bias) if "bias" in layer else 0.0
    w = weights(layer)
    exact = w @ values + bias
    groups = (layer.weight.shape[0] * layer.weight.shape[2] * 32 // layer.bits) // layer.group_size
    size = np.repeat(
        np.abs(wide(layer.scales)).swapaxes(1, 2).reshape(groups, -1) * (2**layer.bits - 1)
        + np.abs(wide(layer.biases)).swapaxes(1, 2).reshape(groups, -1),
        layer.group_size,
        axis=0,
    )[: layer.outputs] @ np.abs(values) + np.abs(bias)
    roundings = kept.sum() + 64  # the longest chain of additions, generously, and the products
    unit = {mx.float16: 2**-11, mx.bfloat16: 2**-8, mx.float32: 2**-24}[x.dtype]
    # w itself was made in float32: one product and one sum more.
    bound = (roundings + 2) * 2**-24 * size + unit * np.abs(exact) + 2**-24 * (x.dtype == mx.float16)
    error = np.abs(wide(y).ravel() - exact)
    assert (error <= bound).all(), f"error {error.max()}, bound {bound[error.argmax()]}"
    assert active == kept.sum()


def run_and_check(x, some):
    ys, active = gpu.sparse_gemv(x, some)
    for y, layer, count in zip(ys, some, np.array(active), strict=True):
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], layer.outputs)
        check(x, layer, y, count)


def normal(inputs, dtype=mx.float16, seed=0):
    return mx.random.normal((1, 1, inputs), key=mx.random.key(seed)).astype(dtype)


CUTS = {
    "wide": geometry.Geometry(32, 32, 4, 2, 128, 8, 0, 100),
    "narrow": geometry.Geometry(32, 4, 32, 2, 256, 4, 0, 1000),
    "narrowest": geometry.Geometry(32, 1, 64, 1, 128, 1, 0, 150),
    "ragged": geometry.Geometry(32, 9, 11, 3, 128, 8, 0, 130),
    "wider": geometry.Geometry(64, 16, 8, 2, 256, 8, 0, 1000),
    "across simdgroups": geometry.Geometry(64, 40, 3, 1, 128, 16, 0, 90),
}


@pytest.mark.parametrize("decode", [0, 1, 2])
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_width_of_code(emulated, monkeypatch, bits, decode):
    use(monkeypatch, CUTS["wide"]._replace(decode=decode))
    run_and_check(normal(333), [make_layer(1000, 333, bits=bits)])


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut(emulated, monkeypatch, cut):
    use(monkeypatch, CUTS[cut])
    run_and_check(normal(257), [make_layer(1100, 257, bits=3, bias=True)])


@pytest.mark.parametrize(
    ("group", "dtype"), itertools.product(layout.GROUP_SIZES, (mx.float16, mx.bfloat16, mx.float32)), ids=str
)
def test_groups_and_dtypes(emulated, monkeypatch, group, dtype):
    use(monkeypatch, CUTS["wider"])
    run_and_check(normal(130, dtype), [make_layer(500, 130, group=group, dtype=dtype)])
