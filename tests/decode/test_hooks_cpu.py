"""The CPU ops behind MLX's names: equal to MLX where they apply, out of the way where they don't."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, llama

from spqt_cli.backends import cpu
from spqt_cli.decode import hooks_cpu

USABLE, REASON = cpu.status()
STOCK_SIGMOID = mx.sigmoid
ATTENTION = hooks_cpu.STOCK["scaled_dot_product_attention"]
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]

# both sides are float32: a few units in the last place of sums of up to 300 terms
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def patched():
    before = (mx.fast.rms_norm, nn.QuantizedLinear.__call__)
    hooks_cpu.install()
    yield
    if before[0] is not hooks_cpu.rms_norm:
        hooks_cpu.remove()


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def name_of(array, tmp_path):
    """The names of the primitives in an array's graph, as MLX prints them."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), array)
    return path.read_text()


def close(y, want, tolerance=TOLERANCE):
    assert y.shape == want.shape
    assert y.dtype == want.dtype
    y, want = np.array(y).astype(np.float64), np.array(want).astype(np.float64)
    assert np.linalg.norm(y - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 7, 100), (2, 33)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape, weighted, tmp_path):
    x, weight = random(*shape), random(shape[-1], seed=1) if weighted else None
    y = mx.fast.rms_norm(x, weight, 1e-5)
    assert "SpqtRmsNorm" in name_of(y, tmp_path)
    close(y, hooks_cpu.STOCK["rms_norm"](x, weight, 1e-5))


def test_rms_norm_of_strided_input():
    x = random(8, 3, 64)[:, 1]
    close(mx.fast.rms_norm(x, None, 1e-5), hooks_cpu.STOCK["rms_norm"](x, None, 1e-5))


@pytest.mark.parametrize("shape", [(1, 49152), (1, 1), (3, 5), (2, 1037)], ids=str)
@pytest.mark.parametrize("keepdims", [True, False])
def test_logsumexp(shape, keepdims, tmp_path):
    x = random(*shape) * 9 - 200
    y = mx.logsumexp(x, keepdims=keepdims)
    assert "SpqtLogSumExp" in name_of(y, tmp_path)
    want = np.logaddexp.reduce(np.array(x).astype(np.float64), axis=None, keepdims=keepdims)
    assert y.shape == want.shape
    # the result is rounded once (2^-24 of 200), its logarithm's error is that of a sum of exponentials
    assert np.abs(np.array(y) - want).max() <= 200 * 2**-23 + 1e-5


@pytest.mark.parametrize("at", [0, 3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logsumexp_of_what_is_not_finite(at, value):
    x = random(1, 41)
    x[0, at] = value
    for one in (x, mx.full((1, 41), value)):
        assert mx.allclose(mx.logsumexp(one), hooks_cpu._logsumexp(one), equal_nan=True)
    assert mx.isnan(mx.logsumexp(mx.array([float("inf"), float("nan")])))


def test_logsumexp_of_strided_input_and_its_gradient():
    x = random(40, 3)[:, 1]
    close(mx.logsumexp(x), hooks_cpu._logsumexp(x))
    close(mx.grad(lambda x: mx.logsumexp(x, keepdims=True).sum())(x), mx.softmax(x))


@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize(("dims", "width", "positions", "offset"), [(64, 64, 1, 9), (32, 80, 7, 0)])
def test_rope(dims, width, positions, offset, traditional, tmp_path):
    x = mx.swapaxes(random(2, positions, 3, width), 1, 2)
    freqs = mx.arange(1, dims // 2 + 1).astype(mx.float32)
    for base, given in ((10000.0, None), (None, freqs)):
        form = {"traditional": traditional, "base": base, "scale": 0.5, "offset": offset, "freqs": given}
        y = mx.fast.rope(x, dims, **form)
        assert "SpqtRope" in name_of(y, tmp_path)
        close(y, hooks_cpu.STOCK["rope"](x, dims, **form))


@pytest.mark.parametrize("positions", [1, 5])
def test_rope_from_an_offset_of_each_sequence(positions, tmp_path):
    """As MLX has it, and bit for bit as each sequence has it alone."""
    x, offsets = random(3, 2, positions, 32), mx.array([-2, 700, 3]) + 1  # lazy, as mlx-lm's are
    form = {"traditional": False, "base": 1e4, "scale": 1.0}
    y = mx.fast.rope(x, 24, **form, offset=offsets)
    assert "SpqtRope" in name_of(y, tmp_path)
    close(y, hooks_cpu.STOCK["rope"](x, 24, **form, offset=offsets))
    for at in range(3):
        alone = mx.fast.rope(x[at : at + 1], 24, **form, offset=offsets[at].item())
        assert mx.array_equal(y[at : at + 1], alone).item()


def test_logsumexp_of_more_numbers_than_ours_takes():
    x = mx.zeros((8, 2048, 151936))  # never evaluated
    assert mx.logsumexp(x, axis=-1).shape == (8, 2048)


@pytest.mark.parametrize("keepdims", [True, False])
def test_logsumexp_of_each_row(keepdims, tmp_path):
    x = random(3, 2, 1037) * 9 - 200
    y = mx.logsumexp(x, axis=-1, keepdims=keepdims)
    assert "SpqtLogSumExp" in name_of(y, tmp_path)
    assert y.shape == ((3, 2, 1) if keepdims else (3, 2))
    close(y, hooks_cpu._logsumexp(x, axis=-1, keepdims=keepdims))
    assert mx.array_equal(y.reshape(-1)[4], mx.logsumexp(x[2, 0])).item()
    close(mx.grad(lambda x: mx.logsumexp(x, axis=-1).sum())(x), mx.softmax(x, axis=-1))
    compiled = mx.compile(lambda x: mx.logsumexp(x, axis=-1, keepdims=keepdims), shapeless=True)
    for rows in (x, x[0], x[:, :1]):  # nn.log_softmax is compiled so
        assert mx.array_equal(compiled(rows), mx.logsumexp(rows, axis=-1, keepdims=keepdims)).item()


def test_attention_of_one_row_of_each_sequence_with_a_mask(tmp_path):
    q, (k, v) = random(3, 4, 1, 32), (random(3, 2, 150, 32, seed=s) for s in (1, 2))
    mask = mx.arange(150) >= mx.array([0, 20, 149])[:, None, None, None]
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask)
    assert "SpqtAttention" in name_of(y, tmp_path)
    close(y, ATTENTION(q, k, v, scale=0.2, mask=mask))


@pytest.mark.parametrize(
    ("heads", "key_heads", "rows", "keys", "width", "mask"),
    [
        (9, 3, 1, 1, 64, None),
        (9, 3, 1, 128, 64, None),
        (9, 3, 1, 129, 64, "causal"),
        (4, 4, 1, 300, 80, None),
        (8, 2, 1, 700, 128, None),
        (9, 3, 17, 17, 64, "causal"),
        (6, 3, 200, 260, 32, "causal"),
        (4, 2, 100, 70, 48, None),
        (2, 1, 97, 300, 256, "causal"),
    ],
)
def test_attention(heads, key_heads, rows, keys, width, mask):
    if mask is None and rows > keys:
        rows, keys = keys, rows
    q = random(2, heads, rows, width)
    # a slice of a longer cache, as mlx-lm passes it
    k, v = (random(2, key_heads, keys + 37, width, seed=s)[:, :, :keys] for s in (1, 2))
    assert cpu.attends(q, k, v)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask=mask)
    close(y, ATTENTION(q, k, v, scale=width**-0.5, mask=mask))


def test_attention_with_large_scores():
    q, k = random(1, 2, 3, 64) * 60, random(1, 2, 90, 64, seed=1) * 60
    want = ATTENTION(q, k, k, scale=1.0, mask="causal")
    close(mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask="causal"), want)


def test_nan_reaches_the_output():
    q, k = random(1, 1, 1, 64), random(1, 1, 40, 64, seed=1)
    k[0, 0, 5, 0] = float("nan")
    assert mx.isnan(mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0)).all()


def test_other_cases_go_to_mlx(tmp_path):
    half = random(1, 2, 3, 64).astype(mx.float16)
    q = random(1, 2, 3, 64)
    others = [
        mx.fast.rms_norm(half, None, 1e-5),
        mx.fast.rms_norm(q, None, 1e-5, stream=mx.cpu),
        mx.fast.rope(half, 64, traditional=False, base=1e4, scale=1.0, offset=0),
        mx.fast.rope(q, 64, traditional=False, base=1e4, scale=1.0, offset=mx.array([3], mx.int64)),
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mx.zeros((3, 3))),
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, sinks=mx.zeros((2,))),
        mx.logsumexp(q, axis=1),
        mx.logsumexp(q, -1),
        mx.logsumexp(half),
        mx.fast.scaled_dot_product_attention(q[..., :40], q[..., :40], q[..., :40], scale=1.0),
    ]
    for y in others:
        assert "Spqt" not in name_of(y, tmp_path)
        mx.eval(y)


def test_layers(tmp_path):
    x = random(2, 3, 64)
    embedding = nn.QuantizedEmbedding.from_embedding(nn.Embedding(200, 64), 64, 4)
    linear = nn.QuantizedLinear.from_linear(nn.Linear(64, 96), 32, 8)
    for ours, stock in (
        (embedding.as_linear(x), hooks_cpu._as_linear(embedding, x)),
        (linear(x), hooks_cpu._quantized_linear(linear, x)),
    ):
        assert "SpqtDense" in name_of(ours, tmp_path)
        close(ours, stock)


def test_layers_of_other_modes_go_to_mlx():
    linear = nn.QuantizedLinear.from_linear(nn.Linear(64, 96), mode="mxfp4")
    x = random(1, 64)
    assert mx.array_equal(linear(x), hooks_cpu._quantized_linear(linear, x))


def test_gradients_are_mlx_own():
    x, weight = random(1, 3, 64), random(64, seed=1)
    ours = mx.grad(lambda x: (mx.fast.rms_norm(x, weight, 1e-5) * weight).sum())(x)
    stock = mx.grad(lambda x: (hooks_cpu.STOCK["rms_norm"](x, weight, 1e-5) * weight).sum())(x)
    close(ours, stock)


@pytest.mark.parametrize("shape", [(1, 1, 1536), (2, 3, 50), (1, 40, 8191), (7,)], ids=str)
def test_swiglu(shape, tmp_path):
    gate, up = random(*shape) * 4, random(*shape, seed=1)
    y = llama.swiglu(gate, up)
    assert "SpqtSwiglu" in name_of(y, tmp_path)
    close(y, gate * STOCK_SIGMOID(gate) * up, 1e-6)


def test_swiglu_of_strided_inputs_and_its_gradient():
    both = random(5, 2, 64)
    gate, up = both[:, 0], both[:, 1].T.reshape(5, 64)
    weight = random(5, 64, seed=2)

    def of(swiglu):
        return mx.grad(lambda g, u: (swiglu(g, u) * weight).sum(), argnums=(0, 1))(gate, up)

    close(llama.swiglu(gate, up), gate * STOCK_SIGMOID(gate) * up, 1e-6)
    for ours, want in zip(of(llama.swiglu), of(lambda g, u: g * STOCK_SIGMOID(g) * u), strict=True):
        close(ours, want, 1e-6)


def test_swiglu_of_what_is_not_finite_or_far_out():
    gate = mx.array([-1e4, -100.0, -88.0, 88.0, 1e4, float("inf"), float("nan"), 0.0])
    want = gate * STOCK_SIGMOID(gate) * 2
    y = llama.swiglu(gate, mx.full((8,), 2.0))
    np.testing.assert_allclose(np.array(y), np.array(want), rtol=1e-6, atol=1e-30)


def test_other_swiglus_are_mlx_lms(tmp_path, monkeypatch):
    gate, up = random(2, 40), random(2, 40, seed=1)
    cases = [(gate.astype(mx.float16), up.astype(mx.float16)), (gate, up[:1]), (gate[:0], up[:0])]
    for case in cases:
        assert "SpqtSwiglu" not in name_of(llama.swiglu(*case), tmp_path)
    monkeypatch.setattr(mx, "sigmoid", mx.zeros_like)  # as calibration puts numpy's there
    mx.disable_compile()
    try:
        assert not llama.swiglu(gate, up).any()
    finally:
        mx.enable_compile()


def test_removing_gives_mlx_its_own_back():
    hooks_cpu.remove()
    assert mx.logsumexp is hooks_cpu._logsumexp
    assert mx.fast.rms_norm is hooks_cpu.STOCK["rms_norm"]
    assert llama.swiglu is activations.swiglu is hooks_cpu._activations()[1]
    hooks_cpu.install()
    assert llama.swiglu is activations.swiglu is hooks_cpu.swiglu
