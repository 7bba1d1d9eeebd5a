"""Blocks with a mixture of experts: fused up to the experts, which run by their own code; as unfused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import mixtral, olmoe, qwen3_moe
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchLinear

from spqt_cli.backends import cpu, interface
from spqt_cli.decode import active_counts, fused, hooks, layers, phase, recognize
from tests.backends.gpu.test_kernels import emulated, kinds
from tests.conftest import layer_settings
from tests.decode.test_fused_block import WIDTH, Doubled, block, steps, striped, token
from tests.decode.test_fused_mlp import on_emulator
from tests.lib.backends import EMULATED

__all__ = ["emulated", "on_emulator", "striped"]  # fixtures
pytestmark = pytest.mark.usefixtures("decode_steps")
USABLE, REASON = cpu.status()
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
MODELS = [mixtral, olmoe, qwen3_moe]


def mixture(model):
    """A block of random Zigzag layers and experts that skip some channels."""
    mx.random.seed(4)
    hooks.install()
    args = model.ModelArgs.from_dict(layer_settings(hidden_size=WIDTH, head_dim=32, **EXPERTS))
    made = model.Model(args).layers[0]
    own = recognize.parts(made)[3]
    entry = {"group_size": 32, "bits": 4, "mode": "zigzag", "spqt": {"band": 96, "experts": 4}}
    plain = {"group_size": 64, "bits": 4, "mode": "zigzag"}

    def kind(path, one):
        if isinstance(one, SwitchLinear):
            return entry
        return plain if "self_attn" in path and isinstance(one, nn.Linear) else False

    nn.quantize(made, class_predicate=kind)
    layers.share_inputs(made)
    for path, layer in layers.zigzag_layers(made).items():
        layer.set_threshold(0.3 if "self_attn" in path else 0.05)
    made.post_attention_layernorm.weight = mx.random.uniform(0.5, 1.5, (WIDTH,))
    made[own].gate.weight = made[own].gate.weight * 8  # no ties, which another order of sums would decide
    mx.eval(made.parameters())
    return made


def installed(made):
    fused.install_block(made)
    assert fused.BLOCK in made.__dict__
    return made


def compared(model):
    """Outputs and counts of a few steps by a block's own code, then fused."""
    expected, shares = steps(mixture(model))
    made = installed(mixture(model))
    made(token(4), None, cache=KVCache())  # on a GPU the first step is held against the block's own way
    found, counted = steps(made)
    assert made._fused_block.reason == ""
    # float32 sums in other orders, no more than a few hundred roundings of 2^-24
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert len(counted) == len(shares) == 7
    assert sorted(counted.values()) == pytest.approx(sorted(shares.values()), abs=1e-6)
    assert min(counted.values()) < 0.99
    return made


@pytest.mark.parametrize("model", MODELS)
def test_steps_on_a_gpu_are_the_block_s_own(striped, model):
    made = compared(model)
    assert made._fused_block._traced.reason == ""
    striped.clear()
    made(token(8), None, cache=KVCache())  # nobody counts
    assert kinds(striped)[:4] == ["gemv", "reduce"] * 2  # q/k/v, o; then the experts' own


@pytest.mark.skipif(not USABLE, reason=REASON)
@pytest.mark.parametrize("model", MODELS)
def test_steps_on_a_cpu_are_the_block_s_own(model, tmp_path):
    made = compared(model)
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), made(token(5), None, cache=KVCache()))
    text = path.read_text()
    assert (text.count("SpqtHead"), text.count("SpqtMiddle")) == (1, 1)
    assert "SpqtSparseGemv" not in text


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_rows_of_a_batch_are_those_alone():
    made = installed(mixture(mixtral))
    alone = [made(token(seed), None, cache=None) for seed in (5, 6, 7)]
    found = made(mx.concatenate([token(seed) for seed in (5, 6, 7)]), None, cache=None)
    assert made._fused_block.reason == ""
    assert mx.array_equal(found, mx.concatenate(alone)).item()


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_a_prompt_of_one_row_is_dense_and_experts_are_counted_once():
    made = installed(mixture(mixtral))
    sparse, _ = steps(made)
    with phase.prompting():
        prompt, counted = steps(made)
    assert counted == {}
    assert not np.allclose(prompt, sparse, rtol=1e-2, atol=1e-2)
    with active_counts.counting() as counter:
        made(token(5), None, cache=KVCache())
    rows = {id(share.layer): share.rows for share in counter.shares()}
    expected = {path: 2 if "switch_mlp" in path else 1 for path in layers.zigzag_layers(made)}
    assert {path: rows[id(layer)] for path, layer in layers.zigzag_layers(made).items()} == expected


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_the_middle_bit_for_bit_and_what_does_not_fit():
    made = block()
    out = made.self_attn.o_proj
    norm = interface.Norm(made.post_attention_layernorm["weight"], 1e-5)
    attended, x = token(6), token(5)
    (h, normed), (count,) = cpu.prepare_middle(x, interface.Middle(out, norm))(attended, x, [None])
    (product,), active = cpu.sparse_gemv(attended, [out])
    assert mx.array_equal(h, product + x).item()
    assert mx.array_equal(normed, cpu.rms_norm(h, norm.weight, norm.eps)).item()
    assert count.item() == active.item() < out.inputs
    step = cpu.prepare_middle(x, interface.Middle(out, norm))
    assert step(attended, x, [mx.array([7], mx.uint32)])[1][0].item() == active.item() + 7
    half = x.astype(mx.float16)
    assert cpu.prepare_middle(half, interface.Middle(out, norm)) is None
    with pytest.raises(ValueError, match="one count"):
        step(attended, x, [None] * 3)
    with pytest.raises(ValueError, match="as many rows"):
        step(mx.zeros((2, 192)), x, [None])


class Scaled(mixtral.MixtralDecoderLayer):
    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, mask, cache) * 2


def test_only_blocks_of_this_form_are_taken(monkeypatch):
    made = mixture(mixtral)
    assert recognize.why_not(made, EMULATED) == ""
    assert list(recognize.formed(made)) == [".self_attn"]
    made.__class__ = Scaled
    assert "in another way" in recognize.form(made)
    monkeypatch.setattr(fused.select, "backend", lambda: EMULATED)
    stack = nn.Module()
    stack.layers = [mixture(olmoe), mixture(qwen3_moe), block(kind=Doubled)]
    found = fused.report(stack)
    assert (found.blocks, found.fused, found.experts) == (3, 2, 2)
    assert found.line().endswith("; 2 up to their experts")
