"""A block as two traced calls around the attention product: which attentions run so, and equal results."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, qwen3
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from spqt_cli.decode import attention_gpu
from spqt_cli.decode.attention_gpu import OwnAttention
from tests.backends.gpu.test_kernels import emulated
from tests.decode.test_fused_block import WIDTH, block, installed, steps, striped
from tests.decode.test_fused_mlp import on_emulator

__all__ = ["emulated", "on_emulator", "striped"]  # fixtures
pytestmark = pytest.mark.usefixtures("decode_steps")

CACHES = {
    "plain": KVCache,
    "rotating": lambda: RotatingKVCache(2),
    "quantized": lambda: QuantizedKVCache(group_size=32, bits=8),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("model", [llama, qwen3])
def test_every_kind_of_cache_is_asked_itself(striped, model, kind):
    made = block(model)
    before, after = CACHES[kind](), CACHES[kind]()
    expected, _ = steps(made, range(5), before)
    found, _ = steps(installed(made), range(5), after)
    assert made._fused_block._traced.reason == ""
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert after.offset == before.offset == 5


def around(made):
    attention = made.self_attn
    own = OwnAttention(attention, attention.q_proj.shared_input.layers)
    return attention_gpu.AroundProduct(own)


def traced(kind):
    made = block()
    made.self_attn.__class__ = kind
    products = [mx.ones((1, 1, layer.outputs)) for layer in made.self_attn.q_proj.shared_input.layers]
    return around(made).traced(mx.ones((1, 1, WIDTH)), products, mx.array(3))


def test_tracing_touches_neither_the_module_nor_mlx_lm():
    made = block()
    before = dict(made.self_attn), dict(vars(llama)), vars(llama.Attention).copy()
    half = around(made)
    attended = mx.random.normal((1, 6, 1, 32))
    assert mx.array_equal(half.after(attended), attended.reshape(1, 1, WIDTH)).item()
    assert (dict(made.self_attn), dict(vars(llama)), vars(llama.Attention).copy()) == before


def test_what_the_product_is_given():
    (q, k, v), settings = traced(llama.Attention)
    assert [one.shape for one in (q, k, v)] == [(1, 6, 1, 32), (1, 2, 1, 32), (1, 2, 1, 32)]
    assert settings == {"scale": 32**-0.5}
    assert mx.array_equal(v, mx.ones(v.shape)).item()
    rope = block().self_attn.rope
    assert mx.allclose(q, rope(mx.ones(q.shape), offset=3)).item()


class Gating(llama.Attention):
    """Uses x after the product as well, so that the half after it is no function of the product alone."""

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
        found = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(1, 1, -1) * mx.sigmoid(x))

    def heads(self, y):
        return y.reshape(1, 1, -1, 32).transpose(0, 2, 1, 3)


class ByHand(Gating):
    """Has a product that is not mlx-lm's."""

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (mx.repeat(a, 3, axis=1) for a in cache.update_and_fetch(k, v))
        found = mx.softmax(q @ k.swapaxes(2, 3) * self.scale, axis=-1) @ v
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(1, 1, -1))


class OtherCache(Gating):
    """Gives the product no cache."""

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.update_and_fetch(k, v)
        found = scaled_dot_product_attention(q, k, v, cache=None, scale=self.scale, mask=mask)
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(1, 1, -1))


class OtherKeys(Gating):
    """Changes the keys that the cache gives."""

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.update_and_fetch(k, v)
        found = scaled_dot_product_attention(q, k * 2, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(1, 1, -1))


class Demanding(Gating):
    """Wants more of the cache than a position."""

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.update_and_fetch(k, v)
        found = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(1, 1, -1) * cache.keys.max())


CAUSES = {
    Gating: "after the product it uses more than the product",
    ByHand: "it calls scaled_dot_product_attention 0 times",
    OtherCache: "its product takes another cache or mask",
    OtherKeys: "its product is not of the keys and values that the cache gives",
    Demanding: "its code can't be run on stand-ins (AttributeError",
}


@pytest.mark.parametrize("kind", CAUSES)
def test_attention_that_cannot_be_traced_runs_its_own_code(striped, kind):
    made = block()
    made.self_attn.__class__ = kind
    expected, shares = steps(made)
    found, counted = steps(installed(made))
    assert made._fused_block._traced.reason.startswith(CAUSES[kind])
    assert made._fused_block.attention.startswith(CAUSES[kind])
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert counted == shares


class Counting(nn.Module):
    """A part that watches its calls, as calibration's do."""

    def __init__(self, layer):
        super().__init__()
        self._layer, self._calls = layer, []

    def __call__(self, x):
        self._calls.append(x.shape)
        return self._layer(x)


def test_a_watched_projection_is_called_in_every_step(striped):
    made = installed(block())
    before, _ = steps(made)
    made.self_attn.k_proj = watched = Counting(made.self_attn.k_proj)
    after, _ = steps(made)
    assert watched._calls == [(1, 1, WIDTH)] * 3
    assert np.allclose(after, before, rtol=1e-4, atol=1e-4)


def test_a_projection_of_mlx_s_own_is_used_in_the_place_of_the_shared_one(striped):
    made, other = block(), block()
    linear = nn.Linear(WIDTH, 64, bias=False)
    for one in (made, other):
        one.self_attn.k_proj = linear
    expected, _ = steps(other)
    found, _ = steps(installed(made))
    assert made._fused_block._traced.reason == ""
    assert made._fused_block._traced._position is attention_gpu._as_array
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_other_parts_of_attention_are_seen(striped):
    made = installed(block())
    before, _ = steps(made)
    kept = made.self_attn.rope
    made.self_attn.rope = nn.RoPE(32, base=100.0)
    after, _ = steps(made)
    assert not np.array_equal(after, before)
    fresh = block()
    fresh.self_attn.rope = made.self_attn.rope
    assert np.allclose(after, steps(fresh)[0], rtol=1e-4, atol=1e-4)
    made.self_attn.rope = kept
    assert np.array_equal(steps(made)[0], before)
