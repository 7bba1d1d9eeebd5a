"""numpy's products against MLX's own, values and gradients, for one model of each kind of attention."""

import signal

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.measure import many_rows

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of some hundred terms, in another order


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def check(mine, theirs, *arrays: mx.array) -> None:
    """Values, and the gradients with respect to all arrays."""
    assert mx.allclose(mine(*arrays), theirs(*arrays), **TOLERANCE)
    every = list(range(len(arrays)))
    weight = random(*mine(*arrays).shape, seed=9)
    gradients = [
        mx.grad(lambda *a, f=f: (f(*a) * weight).sum(), argnums=every)(*arrays) for f in (mine, theirs)
    ]
    for one, other in zip(*gradients, strict=True):
        assert mx.allclose(one, other, **TOLERANCE)


@pytest.mark.parametrize("mask", ["causal", None, "bool", "added"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("width", [8, 16])  # 16 is what our extension takes
def test_attention(mask, heads, width):
    rows, length = 5, 9  # a continuation: more keys than queries
    allowed = mx.arange(length - rows, length)[:, None] >= mx.arange(length)[None]
    given = {"bool": allowed, "added": mx.where(allowed, 0.5, -1e9)}.get(mask, mask)
    q, k, v = (random(2, heads[i > 0], length if i else rows, width, seed=i) for i in range(3))
    mine = lambda q, k, v: many_rows.attention(q, k, v, scale=0.3, mask=given)  # noqa: E731
    theirs = lambda q, k, v: many_rows._attention(q, k, v, scale=0.3, mask=given)  # noqa: E731
    check(mine, theirs, q, k, v)


@pytest.mark.parametrize(("outputs", "band", "bias"), [(96, 96, False), (100, 64, True), (192, 64, False)])
def test_zigzag_linear_band_not_full(outputs, band, bias):
    linear = nn.Linear(40, outputs, bias=bias)
    layer = ZigzagLinear.from_linear(linear, 32, 4, spqt={"band": band})
    mx.eval(layer.parameters())
    w = layer.dequantized()
    check(
        lambda x: many_rows.linear(x, layer),
        lambda x: x @ w.T + (linear.bias if bias else 0),
        random(2, 3, 40),
    )


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: nn.Linear(i, o, bias=False).to_quantized(32, 4)])
def test_stock_layers_inside_the_block(make):
    layer = make(64, 32)
    check_block(layer, random(2, 3, 64))


@pytest.mark.parametrize("quantized", [False, True])
def test_tied_heads_inside_the_block(quantized):
    embedding = nn.Embedding(48, 64)
    embedding = embedding.to_quantized(32, 4) if quantized else embedding
    check_block(embedding.as_linear, random(2, 3, 64))


def check_block(call, x: mx.array) -> None:
    def inside(x: mx.array) -> mx.array:
        with many_rows.many_rows():
            return call(x)

    check(inside, call, x)


def test_the_block_leaves_everything_as_it_was():
    def replaced():
        return mx.fast.scaled_dot_product_attention, nn.Linear.__call__, nn.QuantizedEmbedding.as_linear

    before = replaced()
    with pytest.raises(KeyError), many_rows.many_rows():
        raise KeyError
    assert before == replaced()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 64)])
def test_unpacked_weights_are_those_of_mlx(bits, shape):
    weight, scales, biases = mx.quantize(random(*shape), group_size=32, bits=bits)
    layer = nn.QuantizedLinear(32, 8, group_size=32, bits=bits)
    layer.weight, layer.scales, layer.biases = weight, scales, biases
    expected = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
    # float32 both; one product and one sum, which a compiler may fuse
    assert mx.allclose(mx.array(many_rows.unpacked(layer)), expected, rtol=1e-6, atol=1e-6)


def test_held_weights_are_the_same_up_to_the_limit():
    layers = [nn.QuantizedLinear(64, 64, bias=False, group_size=32) for _ in range(3)]
    size = 64 * 64 * 4
    with many_rows.holding(2.5 * size):
        first = [many_rows.unpacked(layer) for layer in layers]
        again = [many_rows.unpacked(layer) for layer in layers]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True, False]
    for one, other in zip(first, again, strict=True):
        assert (one == other).all()
    assert many_rows.unpacked(layers[0]) is not first[0]


def test_activations_stay_ours_after_an_inner_block(monkeypatch):
    asked = []
    monkeypatch.setattr(many_rows, "sigmoid", lambda a, stock=many_rows.sigmoid: asked.append(1) or stock(a))
    with many_rows.many_rows():
        with many_rows.many_rows():
            pass
        mx.eval(nn.silu(mx.ones(3)))
    assert asked == [1]


class _Heard(BaseException):
    pass


def _product_with_a_signal(x: mx.array, w: np.ndarray) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.004)
    mx.eval(many_rows._plain(x, w, None))


def test_a_signal_that_comes_during_a_product_is_heard():
    """mx.array loses what a handler raises within it: see findings/mlx-array-loses-a-signal.sh."""

    def hear(number, frame):
        raise _Heard

    before = signal.signal(signal.SIGALRM, hear)
    w = np.ones((4096, 2048), np.float32)
    x = mx.ones((512, 2048))  # a product of tens of milliseconds
    mx.eval(x)
    try:
        for _ in range(5):
            with pytest.raises(_Heard):
                _product_with_a_signal(x, w)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
