"""Tensor parallel for architectures that mlx-lm runs on one machine only.

What `shard` does in mlx-lm's own models, for models of the same form: separate q, k, v and o, the heads
counted by two numbers of the attention module, norms of single heads, and gate, up and down.
"""

from functools import partial
from typing import Any

TYPES = ("gemma2", "gemma3", "gemma3_text")
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")


def covers(config: dict[str, Any]) -> bool:
    """Whether `give` gives a model of this config.json its `shard`."""
    return config.get("model_type") in TYPES


def give(model: Any, config: dict[str, Any]) -> None:
    """Give a model of one of TYPES the method `shard` that mlx-lm's other models have."""
    if covers(config) and not hasattr(model, "shard"):
        model.shard = partial(shard, model)


def shard(model: Any, group: Any) -> None:
    """Keep this process's part of every block of `model`."""
    from mlx.nn.layers.distributed import shard_linear

    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        for owner, names, last in ((attention, _ATTENTION, "o_proj"), (mlp, _GATED, "down_proj")):
            for name in names:
                owner[name] = shard_linear(owner[name], "all-to-sharded", group=group)
            owner[last] = shard_linear(owner[last], "sharded-to-all", group=group)
        attention.n_heads //= group.size()
        attention.n_kv_heads //= group.size()
