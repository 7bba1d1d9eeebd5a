"""The sparse product on the CPU extension, over the full matrix of formats.

Contract: `cpu.sparse_gemv` is matmul(mask(x, threshold), W) for one row, with exact counts, for every width
of code, group, dtype and instruction set; results of two runs are equal bit for bit.
The reference is NumPy in float64; errors are held as norms. FLOAT_TOLERANCE: float32 roundings of either sign
over 4,000 terms come to about sqrt(4000) * 2^-24 = 4e-6. In 16 bits the result's own rounding is the larger.
"""

import threading

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.format import layout

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]

FLOAT_TOLERANCE = 1e-5  # float32 sums of a few thousand terms: 24 bits, errors of both signs
HALF_TOLERANCE = 2e-3  # float16 y: half a unit of its 11 bits is 2**-11 of the largest output at most
BFLOAT_TOLERANCE = 1.5e-2  # bfloat16 y: 8 bits


class Layer(dict):
    """A `interface.Projection` of random weights; `matrix` is what the packed arrays stand for, float64."""

    def __init__(self, shape, bits=4, group_size=64, *, band=None, dtype=mx.float16, threshold=0.0, seed=0):
        super().__init__()
        outputs, _ = shape
        rng = np.random.default_rng(seed)
        w = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
        self.outputs, self.bits, self.group_size = outputs, bits, group_size
        band = band or layout.band_of(outputs, group_size)
        packed = layout.quantize(w, bits, group_size, band)
        self.update(zip(("weight", "scales", "biases"), packed, strict=True))
        self.threshold = None if threshold is None else mx.array(np.atleast_1d(np.float32(threshold)))
        mx.eval(packed)

    @property
    def matrix(self):
        wide = (self["scales"].astype(mx.float32), self["biases"].astype(mx.float32))
        w = layout.dequantize(
            self["weight"], *wide, outputs=self.outputs, bits=self.bits, group_size=self.group_size
        )
        return np.array(w).astype(np.float64)


def vector(inputs, dtype=mx.float32, seed=1):
    return mx.array(np.random.default_rng(seed).normal(size=(1, inputs)).astype(np.float32)).astype(dtype)


def as_float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def expected(x, layer):
    """y and the number of active channels, by the definition."""
    values = as_float64(x).ravel()
    threshold = 0 if layer.threshold is None else np.array(layer.threshold)
    active = ~(np.abs(values.astype(np.float32)) < threshold)
    y = layer.matrix @ np.where(active, values, 0)
    bias = layer.get("bias")
    return (y if bias is None else y + as_float64(bias)), int(active.sum())


def check(x, layers, tolerance=FLOAT_TOLERANCE):
    ys, active = cpu.sparse_gemv(x, layers)
    for layer, y, count in zip(layers, ys, active.tolist(), strict=True):
        want, channels = expected(x, layer)
        assert count == channels
        assert y.shape == (*x.shape[:-1], layer.outputs)
        assert y.dtype == x.dtype
        error = np.linalg.norm(as_float64(y).ravel() - want)
        assert error <= tolerance * max(np.linalg.norm(want), 1e-30)


@pytest.fixture
def threads():
    before = cpu.threads()
    yield cpu.set_threads
    cpu.set_threads(before)


def test_memory_is_nan_before_a_task():
    assert cpu._native().is_poisoned()  # or what tests find of memory kept between jobs is chance


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_format(bits, group_size, dtype):
    layer = Layer((330, 141), bits, group_size, dtype=dtype, threshold=0.6)
    check(vector(141), [layer])


@pytest.mark.parametrize("bits", [3, 4])
def test_band_wider_than_a_task(bits):
    check(vector(21), [Layer((9000, 21), bits, 64, band=9024, threshold=0.5)])  # tasks end at 8192 outputs


@pytest.mark.parametrize("band", [32, 64, 96, 224, 4096])
def test_any_band(band):
    check(vector(70), [Layer((200, 70), 4, 32, band=band, threshold=0.5)])


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (33, 17), (576, 64), (2049, 31), (4160, 33)], ids=str)
def test_band_not_full(shape, bits):
    check(vector(shape[1]), [Layer(shape, bits, 32, threshold=0.3)])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float16, HALF_TOLERANCE), (mx.bfloat16, BFLOAT_TOLERANCE)], ids=str
)
def test_half_precision_input(dtype, tolerance):
    layer = Layer((300, 200), threshold=0.7)
    layer["bias"] = vector(300, dtype, seed=5)[0]
    check(vector(200, dtype), [layer], tolerance)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32, 33, 200])
def test_count_of_active_channels(count):
    layer = Layer((320, 200))
    x = np.zeros((1, 200), np.float32)
    x[0, np.random.default_rng(count).permutation(200)[:count]] = 2.0
    layer.threshold = mx.array([1.0])
    check(mx.array(x), [layer])


def test_threshold_per_channel():
    check(vector(120), [Layer((96, 120), threshold=np.random.default_rng(3).uniform(0, 2, 120))])


def test_no_threshold_is_dense():
    check(vector(120), [Layer((96, 120), threshold=None)])


def test_nan_is_active_and_spreads():
    x = np.zeros((1, 64), np.float32)
    x[0, 7] = np.nan
    layer = Layer((64, 64), threshold=1.0)
    (y,), active = cpu.sparse_gemv(mx.array(x), [layer])
    assert active.item() == 1
    assert np.isnan(np.array(y)).all()


def test_several_projections_of_one_input():
    layers = [Layer((576, 100), threshold=0.2), Layer((192, 100), 8, 32, threshold=0.9, seed=2)]
    layers.append(Layer((64, 100), 3, 64, threshold=None, seed=3))
    layers[1]["bias"] = vector(192, seed=9)[0]
    check(vector(100), layers)


@pytest.mark.parametrize("shape", [(4096, 512), (600, 300)], ids=str)
def test_bitwise_equal_for_any_thread_count(threads, shape):
    x, layers = vector(shape[1]), [Layer(shape, threshold=0.4), Layer((192, shape[1]), 6, 32, seed=4)]
    results = []
    for count in (1, 2, 3, 5, 8):
        threads(count)
        results += [[np.array(y) for y in cpu.sparse_gemv(x, layers)[0]] for _ in range(5)]
    for ys in results[1:]:
        assert all((a == b).all() for a, b in zip(ys, results[0], strict=True))


def test_strided_input_and_weights():
    layer = Layer((64, 50), threshold=0.5)
    x = mx.array(np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32))[:, 1:2].T
    layer["weight"] = mx.swapaxes(mx.contiguous(mx.swapaxes(layer["weight"], 1, 2)), 1, 2)
    mx.eval(layer["weight"])
    check(x, [layer])


def test_lazy_in_a_longer_graph():
    layer = Layer((64, 64))
    x = vector(64)
    (y,), _ = cpu.sparse_gemv(x * 2, [layer])
    (z,), _ = cpu.sparse_gemv(mx.tanh(y), [layer])
    want = layer.matrix @ np.tanh(layer.matrix @ (2 * as_float64(x).ravel()))
    # the first product's error passes through tanh (slope <= 1) and one more matrix
    assert np.linalg.norm(as_float64(z).ravel() - want) <= 20 * FLOAT_TOLERANCE * np.linalg.norm(want)


def test_compiled_graph():
    layer = Layer((64, 64), threshold=0.5)
    x = vector(64)
    compiled = mx.compile(lambda x: cpu.sparse_gemv(x, [layer])[0][0])
    assert mx.array_equal(compiled(x), cpu.sparse_gemv(x, [layer])[0][0])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "bits", 7),
        lambda layer: setattr(layer, "group_size", 48),
        lambda layer: setattr(layer, "outputs", 65),
        lambda layer: setattr(layer, "threshold", mx.zeros((3,))),
        lambda layer: layer.update(scales=layer["scales"][:, :10]),
        lambda layer: layer.update(weight=layer["weight"][:, :10]),
        lambda layer: layer.update(bias=mx.zeros((3,))),
    ],
)
def test_wrong_arrays_raise_when_the_graph_is_built(spoil):
    layer = Layer((64, 64))
    spoil(layer)
    with pytest.raises(ValueError, match="spqt"):
        cpu.sparse_gemv(vector(64), [layer])


def test_two_streams_at_once(threads):
    threads(2)
    layers = [Layer((600, 300), threshold=0.4, seed=s) for s in range(2)]
    x = vector(300)
    wanted = [np.array(cpu.sparse_gemv(x, [layer])[0][0]) for layer in layers]
    found = [[], []]

    def work(which):
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(50):
                found[which].append(np.array(cpu.sparse_gemv(x, [layers[which]])[0][0]))

    both = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    for results, want in zip(found, wanted, strict=True):
        assert len(results) == 50
        assert all((one == want).all() for one in results)
