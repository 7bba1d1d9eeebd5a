"""Transformer blocks as two calls around attention: equal to their own code."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.cache import KVCache

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import first_use, geometry, kernel_text, plans
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.decode import active_counts, attention_gpu, fused, hooks, layers, phase
from tests.backends.gpu.test_first_use import fresh_trust, run_emulated
from tests.backends.gpu.test_kernels import CUTS, emulated, kinds, use
from tests.conftest import layer_settings
from tests.decode.test_fused_mlp import on_emulator

__all__ = ["emulated", "fresh_trust", "on_emulator"]  # fixtures
pytestmark = pytest.mark.usefixtures("decode_steps")
WIDTH = 192


class Doubled(llama.TransformerBlock):
    """Named as others are, but not the same function."""

    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, mask, cache) * 2


class Rescaled(llama.Attention):
    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, mask, cache) * 2


def block(model=llama, kind=None):
    """A block of 192 wide, 6 heads, 2 of keys, random Zigzag layers that skip some channels."""
    mx.random.seed(3)
    hooks.install()
    settings = layer_settings(hidden_size=WIDTH, intermediate_size=448, head_dim=32)
    made = (kind or model.TransformerBlock)(model.ModelArgs.from_dict(settings))
    nn.quantize(made, 64, 4, mode="zigzag", class_predicate=lambda _, m: isinstance(m, nn.Linear))
    layers.share_inputs(made)
    for path, layer in layers.zigzag_layers(made).items():
        layer.set_threshold(0.3 if "self_attn" in path else 0.05)
    made.input_layernorm.weight = mx.random.uniform(0.5, 1.5, (WIDTH,))
    mx.eval(made.parameters())
    return made


def installed(made):
    fused.install_mlp(made.mlp)
    fused.install_block(made)
    assert fused.BLOCK in made.__dict__
    return made


def token(seed):
    return mx.random.normal((1, 1, WIDTH), key=mx.random.key(seed))


def steps(made, seeds=(5, 6, 7), cache=None):
    """The outputs of a few steps with a cache, and the shares that were active."""
    cache = cache or KVCache()
    with active_counts.counting() as counter:
        found = [made(token(seed), None, cache=cache) for seed in seeds]
    return np.array(mx.concatenate(found)), {id(layer): share for layer, share in counter.densities()}


@pytest.fixture
def striped(on_emulator, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    return on_emulator


@pytest.mark.parametrize("model", [llama, qwen2, qwen3])
def test_two_calls_give_what_the_block_gives(striped, model):
    made = block(model)
    expected, shares = steps(made)
    installed(made)(token(4), None, cache=KVCache())  # the first step is held against the block's own way
    assert made._fused_block._traced.reason == ""
    turned_by_the_kernel = made._fused_block._traced._position is not attention_gpu._as_array
    assert turned_by_the_kernel is (model is not qwen3)  # which normalizes its heads before it turns them
    striped.clear()
    found, counted = steps(made)
    assert kinds(striped) == ["gemv", "reduce", "count"] * 4 * 3
    # The same products; silu and float32 sums in other orders: a few hundred roundings of 2^-24.
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert counted == shares
    striped.clear()
    made(token(8), None, cache=KVCache())
    assert kinds(striped) == ["gemv", "reduce"] * 4  # nobody counts


def test_steps_are_prepared_once_though_weights_are_laid_out_anew(striped, monkeypatch):
    made, prepared = block(llama), []
    installed(made)
    real = fused.FusedBlock._prepare
    monkeypatch.setattr(fused.FusedBlock, "_prepare", lambda self, x: prepared.append(x) or real(self, x))
    weight = made.mlp.down_proj.weight
    steps(made)
    assert made.mlp.down_proj.weight is not weight
    assert len(prepared) == 1


def test_one_launch_a_product_adds_the_residual_outside(on_emulator, monkeypatch):
    """Where o and down have no reduction that could carry the sum, the pair has."""
    wide, whole = CUTS["wide"], CUTS["wide"]._replace(stripe=1000)
    monkeypatch.setattr(geometry, "choose", lambda _, bands, *__: wide if len(bands) == 2 else whole)
    made = block()
    expected, shares = steps(made)
    found, counted = steps(installed(made))
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert counted == shares


def test_fault_47_a_prompt_of_one_row_is_dense_and_decoding_goes_on_sparse(striped):
    made = installed(block())
    before, _ = steps(made)  # traced in decode steps
    with phase.prompting():
        prompt, counted = steps(made)
    assert counted == {}
    assert np.array_equal(steps(made)[0], before)
    for layer in layers.zigzag_layers(made).values():
        layer.set_threshold(0.0)  # skips nothing, by the kernels that are built already
    dense, _ = steps(made)
    assert np.allclose(prompt, dense, rtol=1e-4, atol=1e-4)
    assert not np.allclose(before, dense, rtol=1e-2, atol=1e-2)


def test_new_thresholds_of_any_layer_are_seen(striped):
    made = installed(block())
    before, _ = steps(made)
    for path, layer in layers.zigzag_layers(made).items():
        kept = layer.threshold
        layer.set_threshold(2.0)
        assert not np.array_equal(steps(made)[0], before), path
        layer.set_threshold(kept)
    assert np.array_equal(steps(made)[0], before)


def test_other_layers_norms_and_rows_take_the_block_s_own_way(striped):
    made = installed(block())
    x = mx.random.normal((1, 3, WIDTH), key=mx.random.key(8))
    expected = llama.TransformerBlock.__call__(made, x, "causal", KVCache())
    assert mx.array_equal(made(x, "causal", cache=KVCache()), expected).item()
    made.self_attn.o_proj = nn.QuantizedLinear.from_linear(nn.Linear(WIDTH, WIDTH, bias=False), 64, 4)
    assert made(token(5)).shape == (1, 1, WIDTH)
    other = installed(block())
    other.input_layernorm = nn.LayerNorm(WIDTH)
    expected = llama.TransformerBlock.__call__(other, token(5))
    assert mx.array_equal(other(token(5)), expected).item()


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_an_adapter_on_a_block_that_ran_fused_is_not_passed_over(striped, name):
    """Put on between two tokens: the step that was traced without it is not taken again."""
    from mlx_lm.tuner.lora import LoRALinear

    made, twin = installed(block()), block()
    steps(made)
    assert made._fused_block.reason == ""
    for one in (made, twin):
        parent = one[name.split(".")[0]]
        adapter = LoRALinear.from_base(parent[name.split(".")[1]], r=4, scale=2.0)
        mx.random.seed(6)
        adapter.lora_a, adapter.lora_b = (mx.random.normal(a.shape) for a in (adapter.lora_a, adapter.lora_b))
        parent.update_modules({name.split(".")[1]: adapter})
    before, (found, counted), (expected, shares) = steps(block())[0], steps(made), steps(twin)
    assert made._fused_block.reason == f"adapters on {name.split('.')[1]}"
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(found, before, rtol=1e-2, atol=1e-2)
    assert sorted(map(str, counted.values())) == sorted(map(str, shares.values()))


def test_blocks_of_other_forms_are_left_alone():
    made = block(kind=Doubled)
    fused.install_block(made)
    assert fused.BLOCK not in made.__dict__
    made = block()
    made.self_attn.__class__ = Rescaled
    fused.install_block(made)
    assert fused.BLOCK not in made.__dict__


def test_an_attention_that_fails_leaves_its_layers_usable(striped):
    made = installed(block())
    steps(made)
    with pytest.raises(ValueError, match="Invalid type"):
        made(token(5), None, cache=object.__new__(type("NoCache", (), {"offset": "x"})))
    out = made.self_attn.o_proj
    assert out(mx.ones((1, 1, WIDTH))).shape == (1, 1, WIDTH)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_first_use_check_judges_the_residual_sum(monkeypatch, fresh_trust, capfd, wrong):
    real = kernel_text.body
    if wrong:
        monkeypatch.setattr(
            kernel_text,
            "body",
            lambda name: real(name).replace("+ float(residual[at])", "- float(residual[at])"),
        )
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["wide"])
    case = problems.Case((128,), 301)
    layers, x = problems.matrices(case), problems.vector(case)
    assert (plans.of_row(x, layers, launching.Form(then="residual")).gemv is None) is wrong
    assert bool(first_use.refused()) is wrong
    assert ("y + residual is off" in capfd.readouterr().err) is wrong
