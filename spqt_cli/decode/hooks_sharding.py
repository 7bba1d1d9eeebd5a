"""The hooks into MLX's sharding: mlx-lm's models cut Zigzag layers as they cut row-grouped ones.

`shard_linear` asks two class methods of MLX for every layer that is not a plain one; they are wrapped.
`shard_inplace` would take axes that mean something else in the Zigzag layout, and say nothing: it is wrapped
as well, also where a model's module has imported it by name, and what it can't cut right is refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn.layers import distributed

from spqt_cli.decode import foreign
from spqt_cli.decode import sharding as cutting
from spqt_cli.decode.layers import ZigzagLayer
from spqt_cli.errors import UnsupportedError

HINT = "try --pipeline"


def install() -> None:
    """Wrap MLX's functions; doing it twice changes nothing."""
    if distributed.shard_inplace.__module__ == __name__:
        return
    for kind, how in (
        (distributed.QuantizedAllToShardedLinear, cutting.ALL_TO_SHARDED),
        (distributed.QuantizedShardedToAllLinear, cutting.SHARDED_TO_ALL),
    ):
        foreign.replace(kind, "from_quantized_linear", _into_parts(kind.from_quantized_linear, how))
    foreign.replace_everywhere(distributed, "shard_inplace", _in_place(distributed.shard_inplace))


def _into_parts(stock: Callable[..., Any], how: str) -> Any:
    """A class method that cuts Zigzag layers by us, others by MLX."""

    @functools.wraps(stock)
    def from_quantized_linear(_: Any, layer: Any, *, segments: Any = 1, group: Any = None) -> Any:
        if isinstance(layer, ZigzagLayer):
            return cutting.shard_linear(layer, how, segments, group or mx.distributed.init())
        return stock(layer, segments=segments, group=group)

    return classmethod(from_quantized_linear)


def _in_place(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def shard_inplace(module: Any, sharding: Any, *, segments: Any = 1, group: Any = None) -> None:
        if isinstance(module, ZigzagLayer):
            if sharding not in (cutting.ALL_TO_SHARDED, cutting.SHARDED_TO_ALL):
                raise UnsupportedError("it shards Zigzag layers along an axis of its own", HINT)
            cutting.shard_inplace(module, sharding, segments, group or mx.distributed.init())
        elif any(isinstance(part, ZigzagLayer) for part in module.modules()):
            raise UnsupportedError("it shards a module with Zigzag layers as a whole", HINT)
        else:
            stock(module, sharding, segments=segments, group=group)

    shard_inplace.__module__ = __name__
    return shard_inplace
