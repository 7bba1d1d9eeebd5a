"""Attention with a cache, softmax(rope(q) @ keys.T * scale) @ values, as one CPU operation in decoding.

Reshapes, rotary positions, the cache's update and attention are fifteen graph nodes a layer, which cost
more than they compute where a model is small. Modules, caches and rotary positions of another form run as
they are.
"""

import copy
from typing import Any

import mlx.core as mx

from spqt_cli.backends import cpu
from spqt_cli.decode import chain, recognize

ATTRIBUTE = "_cached_attention"


class CachedAttention:
    """One module's step, for the rotary positions that it had when this was made."""

    def __init__(self, module: Any) -> None:
        from mlx_lm.models.cache import BatchKVCache, KVCache

        self.module, self.rope, self.kinds = module, module["rope"], (KVCache, BatchKVCache)
        form = recognize.rope(self.rope)
        assert form is not None
        self.step = cpu.prepare_token(module.n_heads, module.n_kv_heads, module.scale, form._asdict())

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedAttention":
        """The same for the copied module; the step holds settings alone."""
        made = object.__new__(CachedAttention)
        made.module, made.rope = copy.deepcopy(self.module, memo), copy.deepcopy(self.rope, memo)
        made.kinds, made.step = self.kinds, self.step
        return made

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, **others: Any) -> mx.array | None:
        """The module's result for x, one row of each sequence; None where the module's own code is to run."""
        module = self.module
        if others or not self.takes(x, mask, cache):
            return None
        products = module["q_proj"](x), module["k_proj"](x), module["v_proj"](x)
        y: mx.array = module["o_proj"](self.attended(products, mask, cache))
        return y

    def takes(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether the step covers a token x of each sequence with this mask and cache."""
        alone, batched = self.kinds
        if type(cache) is alone:
            place, masked = cache.offset, mask is None
        elif type(cache) is batched and isinstance(mask, mx.array):
            place = cache._idx
            masked = mask.shape == (x.shape[0], 1, 1, place + 1) and mask.dtype == mx.bool_
        else:
            return False
        keys: Any = cache.keys
        values: Any = cache.values
        if not masked or keys is None or self.module.get("rope") is not self.rope:
            return False
        if mask is None and keys.shape[0] != 1:
            return False
        return place < keys.shape[2] and cpu.takes_token(x, keys, values)

    def attended(self, products: Any, mask: Any, cache: Any) -> mx.array:
        """What the module gives to `o_proj`; keys and values join the cache. products: q, k and v."""
        place = cache.offset if mask is None else cache._idx
        batched = () if mask is None else (cache.left_padding, mask)
        found, cache.keys, cache.values = self.step(*products, cache.keys, cache.values, place, *batched)
        chain.joined(cache, place, mask)
        attended: mx.array = found
        return attended
