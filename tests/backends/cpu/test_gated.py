"""down(silu(gate) * up) in one step on the CPU extension, and running counts.

Contract: `prepare_gated` gives what three layers one by one give, and counts are added to earlier ones.
Against float64 the tolerance is 2e-5: one product promises 1e-5 (test_products.py), and the second carries on
the first one's error. With another number of threads results are equal bit for bit.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from spqt_cli.backends import cpu, select
from spqt_cli.decode import active_counts, fused
from spqt_cli.decode.layers import ZigzagLinear, share_input

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("decode_steps", "isa")]
INPUTS, OUTPUTS = 301, 96


class Module(nn.Module):
    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def layer(outputs, inputs, seed, bias, threshold):
    rng = np.random.default_rng(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight = mx.array(rng.normal(size=(outputs, inputs)).astype(np.float32) / 4)
    if bias:
        linear.bias = mx.array(rng.normal(size=outputs).astype(np.float32))
    made = ZigzagLinear.from_linear(linear, 64, 4)
    made.set_threshold(threshold)
    mx.eval(made.parameters())
    return made


def module(middle=704, bias=False, threshold=0.4):
    made = Module()
    made.gate_proj = layer(middle, INPUTS, 1, bias, threshold)
    made.up_proj = layer(middle, INPUTS, 2, bias, threshold)
    made.down_proj = layer(OUTPUTS, middle, 3, bias, threshold)
    share_input([made.gate_proj, made.up_proj])
    return made


def vector(seed=5):
    return mx.array(np.random.default_rng(seed).normal(size=(1, 1, INPUTS)).astype(np.float32))


def product(x, one):
    """x (inputs,) float64 through a layer, in float64, with its mask."""
    if one.threshold is not None:
        x = np.where(np.abs(x.astype(np.float32)) < np.array(one.threshold), 0, x)
    y = np.array(one.dequantized()).astype(np.float64) @ x
    return y + np.array(one["bias"]) if "bias" in one else y


@pytest.mark.parametrize("middle", [704, 300])  # 300 ends in part of a vector and in padding of its band
@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(middle, bias):
    made, x = module(middle, bias, threshold=None), vector()
    gate, up = (
        product(np.array(x).ravel().astype(np.float64), one) for one in (made.gate_proj, made.up_proj)
    )
    want = product(gate / (1 + np.exp(-gate)) * up, made.down_proj)
    found, active, active_down = cpu.prepare_gated(x, [made.gate_proj, made.up_proj], made.down_proj)(
        x, None, None
    )
    assert found.shape == (1, 1, OUTPUTS)
    # 1e-5 is what one product promises; the second product carries on the first one's
    assert np.linalg.norm(np.array(found).ravel() - want) <= 2e-5 * np.linalg.norm(want)
    assert active.tolist() == [INPUTS, INPUTS]
    assert active_down.tolist() == [middle]


def test_skipping_as_layer_by_layer():
    made, x = module(), vector()
    with active_counts.counting() as apart:
        expected = made(x)
    fused.install_mlp(made)
    with active_counts.counting() as together:
        found = made(x)
    # silu differs in its last bits, so that a channel at the very threshold might; with this seed none does
    assert mx.linalg.norm(found - expected) <= 1e-5 * mx.linalg.norm(expected)
    shares = {id(one): share for one, share in together.densities()}
    assert shares == {id(one): share for one, share in apart.densities()}
    assert 0.1 < shares[id(made.down_proj)] < 0.9


def test_it_is_one_operation(tmp_path):
    made = module()
    fused.install_mlp(made)
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), made(vector()))
    text = path.read_text()
    assert text.count("SpqtGatedGemv") == 1
    assert "SpqtSparseGemv" not in text


@pytest.mark.parametrize("gate", [-np.inf, -200.0, -87.5, -1e-30, 0.0, 200.0, np.inf, np.nan])
def test_silu_at_its_ends(gate):
    """Gate and up are biases alone, down is ones: the sum of silu(gate) * up."""
    made = module(64, bias=True, threshold=None)
    made.gate_proj.bias, made.up_proj.bias = mx.full((64,), gate), mx.full((64,), 1.0)
    step = cpu.prepare_gated(vector(), [made.gate_proj, made.up_proj], made.down_proj)
    y = step(vector() * 0, None, None)[0] - made.down_proj["bias"]
    h = nn.silu(mx.full((64,), gate))
    want = (made.down_proj.dequantized() @ h).reshape(1, 1, -1)
    # float32 rounding of the subtraction above, at the bias's size of a few
    assert mx.allclose(y, want, rtol=1e-4, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("start", [(None, None), ([5, 7], None), (None, [9]), ([5, 7], [9])])
def test_counts_go_on_from_those_given(start):
    made, x = module(), vector()
    step = cpu.prepare_gated(x, [made.gate_proj, made.up_proj], made.down_proj)
    given = [None if one is None else mx.array(one, dtype=mx.uint32) for one in start]
    _, *fresh = step(x, None, None)
    _, *found = step(x, *given)
    for now, before, alone in zip(found, given, fresh, strict=True):
        assert (now == (alone if before is None else alone + before)).all()


def test_counts_of_one_product_go_on():
    made, x = module(), vector()
    step = select.prepare([made.gate_proj, made.down_proj][:1])
    _, first = step(x, None)
    _, second = step(x, first)
    assert second.item() == 2 * first.item()
    with pytest.raises(ValueError, match="counts"):
        step(x, mx.zeros((2,), mx.uint32))


def test_equal_for_any_number_of_threads():
    made, x, before = module(2048), vector(), cpu.threads()
    found = []
    try:
        for count in (1, 2, 3):
            cpu.set_threads(count)
            step = cpu.prepare_gated(x, [made.gate_proj, made.up_proj], made.down_proj)
            found += [np.array(step(x, None, None)[0]) for _ in range(3)]
    finally:
        cpu.set_threads(before)
    assert all((one == found[0]).all() for one in found)


def test_what_does_not_fit_is_refused():
    made, x = module(), vector()
    pair = [made.gate_proj, made.up_proj]
    assert cpu.prepare_gated(x.astype(mx.float16), pair, made.down_proj) is None
    step = cpu.prepare_gated(x, pair, made.down_proj)
    with pytest.raises(ValueError, match="float32"):
        step(x.astype(mx.float16), None, None)
    with pytest.raises(ValueError, match="channels"):
        cpu.prepare_gated(x, pair, made.gate_proj)
    with pytest.raises(ValueError, match="one size"):
        cpu.prepare_gated(x, [made.gate_proj, layer(128, INPUTS, 4, False, None)], made.down_proj)
