"""Attention with a cache, o(softmax(rope(q) @ keys.T * scale) @ values), as one CPU operation in decoding.

Reshapes, rotary positions, the cache's update and attention are fifteen graph nodes a layer, which cost
more than they compute where a model is small. Modules, caches and rotary positions of another form run as
they are.
"""

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import cpu
from spqt_cli.decode.exact import ExactRoPE

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEADS, _KEY_HEADS, _WIDTH, _SCALE = 4, 2, 8, 0.3  # of the trial


def install(module: nn.Module) -> None:
    """Let an attention module take one token as one operation, if that is what its class computes."""
    if "_token" in module.__dict__ or any(name not in module for name in (*PROJECTIONS, "rope")):
        return
    form = rope_form(module["rope"])
    if form is not None and is_plain(type(module)):
        step = cpu.prepare_token(module.n_heads, module.n_kv_heads, module.scale, form)
        object.__setattr__(module, "_token", Token(module, step, module["rope"]))
        module.__class__ = _traced(type(module))


def rope_form(rope: Any) -> dict[str, Any] | None:
    """The settings with which a module calls `mx.fast.rope`, but the offset; None where that isn't known."""
    from mlx_lm.models.rope_utils import Llama3RoPE

    settings: dict[str, Any]
    if type(rope) is nn.RoPE:
        settings = {"base": rope.base, "scale": rope.scale, "freqs": None}
    elif type(rope) is Llama3RoPE or (type(rope) is ExactRoPE and rope.mscale == 1.0):
        settings = {"base": None, "scale": 1.0, "freqs": rope._freqs}
    else:
        return None
    return {"dims": rope.dims, "traditional": rope.traditional, **settings}


@cache
def _traced(kind: type) -> type:
    """A subclass whose one-row calls with a plain cache go to the module's `Token`."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None, **kwargs: Any) -> mx.array:
        token = self.__dict__.get("_token")
        y = None if token is None or mask is not None or kwargs else token(x, cache)
        return kind.__call__(self, x, mask, cache, **kwargs) if y is None else y

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@cache
def is_plain(kind: type) -> bool:
    """Whether the class's own code is the formula above, tried with numbers for layers and a cache of two."""
    from mlx_lm.models.cache import KVCache

    def rope(a: mx.array, offset: int = 0) -> mx.array:
        return a * mx.arange(1.0, 1.0 + _WIDTH) / 5 + offset

    def heads(a: mx.array, count: int) -> mx.array:
        return a.reshape(1, 1, count, _WIDTH).swapaxes(1, 2)

    x, size = mx.sin(mx.arange(_HEADS * _WIDTH, dtype=mx.float32))[None, None], _KEY_HEADS * _WIDTH
    layers = (mx.cos, lambda x: x[..., :size] * 2, lambda x: mx.exp(x[..., :size]), lambda y: y * 3 + 1)
    parts = {"n_heads": _HEADS, "n_kv_heads": _KEY_HEADS, "head_dim": _WIDTH, "scale": _SCALE, "rope": rope}
    fake = SimpleNamespace(**dict(zip(PROJECTIONS, layers, strict=True)), **parts)
    past = [mx.cos(mx.arange(2.0 * size) * (i + 1)).reshape(1, _KEY_HEADS, 2, _WIDTH) for i in range(2)]
    kept = KVCache()
    kept.update_and_fetch(*past)
    try:
        found = kind.__call__(fake, x, None, kept)
        q, k, v = (layer(x) for layer in layers[:3])
        new = rope(heads(k, _KEY_HEADS), 2), heads(v, _KEY_HEADS)
        keys, values = (mx.concatenate(list(pair), axis=2) for pair in zip(past, new, strict=True))
        repeated = [mx.repeat(a, _HEADS // _KEY_HEADS, axis=1) for a in (keys, values)]
        scores = mx.softmax(rope(heads(q, _HEADS), 2) @ repeated[0].swapaxes(2, 3) * _SCALE, axis=-1)
        expected = layers[3]((scores @ repeated[1]).swapaxes(1, 2).reshape(1, 1, -1))
        same = [
            mx.allclose(a, b, rtol=1e-4, atol=1e-4)
            for a, b in zip(kept.keys_and_values(), (keys, values), strict=True)
        ]
        return bool(
            kept.offset == 3 and all(same) and mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item()
        )
    except Exception:  # the class wants more of its module than these parts: others' code, any error
        return False


class Token:
    """One module's step; None where the module's own code is to run."""

    def __init__(self, module: Any, step: Any, rope: Any) -> None:
        from mlx_lm.models.cache import KVCache

        self.module, self.step, self.rope, self.kind = module, step, rope, KVCache

    def __deepcopy__(self, memo: dict[int, Any]) -> "Token":
        """The same for the copied module; the step holds settings alone."""
        return Token(copy.deepcopy(self.module, memo), self.step, copy.deepcopy(self.rope, memo))

    def __call__(self, x: mx.array, cache: Any) -> mx.array | None:
        """The module's result for x, one row, whose keys and values join the cache."""
        module = self.module
        if type(cache) is not self.kind or x.size != x.shape[-1] or module.get("rope") is not self.rope:
            return None
        keys, offset = cache.keys, cache.offset
        if keys is None or offset >= keys.shape[2]:
            return None
        values: Any = cache.values
        if not cpu.takes_token(x, keys, values):
            return None
        q, k, v = module["q_proj"](x), module["k_proj"](x), module["v_proj"](x)
        attended, cache.keys, cache.values = self.step(q, k, v, keys, values, offset)
        cache.offset = offset + 1
        return module["o_proj"](attended)
