"""A tiny mixture of experts in the form of qwen3_moe: a dense layer, then layers of 4 experts, 2 chosen."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.conftest import SIZES, random_weights, write_tokenizer

CONFIG: dict[str, Any] = {
    **SIZES, "model_type": "qwen3_moe", "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [0], "norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}  # fmt: skip
EXPERTS = "model.layers.1.mlp.switch_mlp"
PROJECTIONS = tuple(f"{EXPERTS}.{name}_proj" for name in ("gate", "up", "down"))


def tiny_mixture(folder: Path, seed: int = 1, **changes: Any) -> Path:
    """Write the checkpoint into `folder`, named as mlx-lm names its tensors, and return it."""
    folder.mkdir(parents=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, seed)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(folder)
    return folder
