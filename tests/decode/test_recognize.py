"""Blocks, attention and gated modules are known by what they compute, and each other one has its reason."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma, gemma3_text, llama, olmo2, qwen2, qwen3

from spqt_cli.decode import exact, foreign, fused, recognize
from spqt_cli.decode.layers import share_input
from tests.decode.test_fused_block import Doubled, Rescaled, block, installed
from tests.lib.backends import DEFINITION, EMULATED


class Unmasked(llama.TransformerBlock):
    def __call__(self, x, mask=None, cache=None):
        h = x + self.self_attn(self.input_layernorm(x), None, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


BLOCKS = [
    (llama.TransformerBlock, True),
    (qwen2.TransformerBlock, True),
    (qwen3.TransformerBlock, True),
    (gemma3_text.TransformerBlock, False),
    (olmo2.TransformerBlock, False),
    (Doubled, False),
    (Unmasked, False),
]


@pytest.mark.parametrize(("kind", "expected"), BLOCKS, ids=lambda one: getattr(one, "__module__", None))
def test_a_block_is_known_by_what_it_computes(kind, expected):
    assert recognize._is_block(kind) is expected


class Twofold(nn.Module):
    def __call__(self, x, mask=None, cache=None):
        if cache is None:
            return x
        return self.o_proj(x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (llama.Attention, ""),
        (qwen3.Attention, ""),
        (gemma.Attention, ""),
        (Rescaled, "attention returns more than o_proj"),
        (Twofold, "attention returns more than o_proj"),
        (type("Made", (nn.Module,), {"__call__": len}), "the source of Made is not at hand"),
    ],
)
def test_attention_must_return_its_last_product_and_nothing_else(kind, expected):
    assert recognize._more_than_out(kind) == expected


class Scaled(llama.Attention):
    def __call__(self, x, mask=None, cache=None):
        return llama.Attention.__call__(self, x * 2, mask, cache)


class Forgetful(llama.Attention):
    """Right but for the cache, which keeps other keys."""

    def __call__(self, x, mask=None, cache=None):
        y = llama.Attention.__call__(self, x, mask, cache)
        cache.keys = cache.keys * 2
        return y


ATTENTIONS = [
    (llama.Attention, True),
    (qwen2.Attention, True),
    (qwen3.Attention, False),
    (gemma3_text.Attention, False),
    (Scaled, False),
    (Forgetful, False),
]


@pytest.mark.parametrize(("kind", "expected"), ATTENTIONS, ids=lambda one: getattr(one, "__module__", None))
def test_attention_with_a_cache_is_known_by_what_it_computes(kind, expected):
    assert recognize._is_cached_attention(kind) is expected


class Clipped(nn.Module):
    """Named as others are, but not the same function."""

    def __call__(self, x):
        return self.down_proj(mx.minimum(nn.silu(self.gate_proj(x)), 1.0) * self.up_proj(x))


@pytest.mark.parametrize(
    ("kind", "expected"), [(llama.MLP, True), (qwen2.MLP, True), (gemma.MLP, False), (Clipped, False)]
)
def test_a_gated_module_is_known_by_what_it_computes(kind, expected):
    assert recognize._is_gated(kind, recognize.GATED[0]) is expected


def test_a_block_as_data():
    made = block()
    found = recognize.block(made, EMULATED)
    attention, mlp = made.self_attn, made.mlp
    assert found.projections == [attention.q_proj, attention.k_proj, attention.v_proj]
    assert found.tail.out is attention.o_proj
    assert list(found.tail.pair) == [mlp.gate_proj, mlp.up_proj]
    assert found.tail.down is mlp.down_proj
    assert found.norm.weight is made.input_layernorm.weight
    assert found.tail.norm.weight is made.post_attention_layernorm.weight
    assert found.rope == recognize.Rope(32, False, 1e4, 1.0, None)
    assert recognize.block(block(qwen3), EMULATED).rope is None  # it normalizes heads first


def other_attention(made):
    made.self_attn.__class__ = Rescaled


def windowed(made):
    made.self_attn._window = 4
    foreign.change_class(made.self_attn, exact._windowed, computes_the_same=False)


def layer_norm(made):
    made.input_layernorm = nn.LayerNorm(192)


def row_grouped(made):
    made.self_attn.o_proj = nn.QuantizedLinear(192, 192, False, 64, 4)
    made.mlp.up_proj = nn.QuantizedLinear(192, 448, False, 64, 4)


def other_mlp(made):
    made.mlp.__class__ = gemma.MLP


def no_norm(made):
    del made.post_attention_layernorm


def fused_projections(made):
    made.self_attn.qkv_proj = made.self_attn.pop("q_proj")


def apart(made):
    share_input([made.mlp.gate_proj])


def test_each_cause_has_its_reason():
    causes = [
        (other_attention, "attention returns more than o_proj"),
        (windowed, "attention makes the mask of its own window"),
        (layer_norm, "its norms are not nn.RMSNorm"),
        (row_grouped, "o_proj and up_proj not in the Zigzag layout"),
        (other_mlp, "mlp is not down(silu(gate) * up)"),
        (no_norm, "it has no post_attention_layernorm"),
        (fused_projections, "attention has no q_proj"),
        (apart, "gate and up do not run in one launch"),
    ]
    for change, reason in causes:
        made = block()
        change(made)
        assert recognize.block(made, EMULATED) == reason
    added = "Doubled adds up norms, attention and mlp in another way"
    assert recognize.block(block(kind=Doubled), EMULATED) == added
    assert recognize.block(block(), DEFINITION) == "backend stock has no fused steps"


def test_a_block_that_answers_calls_is_still_known():
    made = installed(block())
    assert type(made) is not llama.TransformerBlock
    assert foreign.own_class(made) is llama.TransformerBlock
    assert isinstance(recognize.block(made, EMULATED), recognize.Block)


class Stack(nn.Module):
    def __init__(self, *made):
        super().__init__()
        self.layers = list(made)


def test_the_report_counts_blocks_and_reasons(monkeypatch):
    monkeypatch.setattr(fused.select, "backend", lambda: EMULATED)
    odd = [block(), block()]
    for one in odd:
        other_attention(one)
    found = fused.report(Stack(block(), *odd, block(kind=Doubled)))
    assert (found.blocks, found.fused) == (4, 1)
    assert found.line() == (
        "1 of 4 blocks run fused; 2 do not: attention returns more than o_proj; "
        "1 do not: Doubled adds up norms, attention and mlp in another way"
    )
    assert found.reasons["attention returns more than o_proj"] == 2
    plain = Stack(block(), nn.Linear(4, 4))
    assert fused.report(plain).line() == "1 of 1 blocks run fused"
    assert fused.report(plain, lambda layer: isinstance(layer, nn.RMSNorm)).fused == 0
