"""Sizes of well-known models, so that a machine can be measured before anything is downloaded.

The facts of each model's public config.json that decide the shapes of its layers; special tokens,
rope scaling and the like change no speed and are left out.
"""

from typing import Any

from spqt_cli.errors import UsageError

_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "max_position_embeddings",
)  # fmt: skip

# name: (model_type, dtype, tied embeddings, values of _KEYS)
_MODELS: dict[str, tuple[str, str, bool, tuple[float, ...]]] = {
    "smollm2-135m": ("llama", "bfloat16", True, (49152, 576, 1536, 30, 9, 3, 64, 1e5, 8192)),
    "llama-3.2-1b": ("llama", "bfloat16", True, (128256, 2048, 8192, 16, 32, 8, 64, 5e5, 131072)),
    "llama-3.2-3b": ("llama", "bfloat16", True, (128256, 3072, 8192, 28, 24, 8, 128, 5e5, 131072)),
    "llama-3-8b": ("llama", "bfloat16", False, (128256, 4096, 14336, 32, 32, 8, 128, 5e5, 8192)),
    "llama-3-70b": ("llama", "bfloat16", False, (128256, 8192, 28672, 80, 64, 8, 128, 5e5, 8192)),
    "llama-2-7b": ("llama", "float16", False, (32000, 4096, 11008, 32, 32, 32, 128, 1e4, 4096)),
    "llama-2-13b": ("llama", "float16", False, (32000, 5120, 13824, 40, 40, 40, 128, 1e4, 4096)),
    "mistral-7b": ("llama", "bfloat16", False, (32768, 4096, 14336, 32, 32, 8, 128, 1e6, 32768)),
    "qwen2.5-1.5b": ("qwen2", "bfloat16", True, (151936, 1536, 8960, 28, 12, 2, 128, 1e6, 32768)),
    "qwen2.5-7b": ("qwen2", "bfloat16", False, (152064, 3584, 18944, 28, 28, 4, 128, 1e6, 32768)),
    "qwen3-8b": ("qwen3", "bfloat16", False, (151936, 4096, 12288, 36, 32, 8, 128, 1e6, 40960)),
    "qwen3-32b": ("qwen3", "bfloat16", False, (151936, 5120, 25600, 64, 64, 8, 128, 1e6, 40960)),
}

_OF_MIXTURES = (*_KEYS, "num_experts_per_tok", "rms_norm_eps")
# name: (model_type, values of _OF_MIXTURES, what its architecture says besides), all bfloat16 with a head
_MIXTURES: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "olmoe-1b-7b": (
        "olmoe", (50304, 2048, 1024, 16, 16, 16, 128, 1e4, 4096, 8, 1e-5), {"num_experts": 64},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe", (151936, 2048, 6144, 48, 32, 4, 128, 1e6, 40960, 8, 1e-6),
        {"num_experts": 128, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
         "norm_topk_prob": True},
    ),
    "gpt-oss-20b": (
        "gpt_oss", (201088, 2880, 2880, 24, 64, 8, 64, 150000, 131072, 4, 1e-5),
        {"num_local_experts": 32, "sliding_window": 128},
    ),
    "mixtral-8x7b": (
        "mixtral", (32000, 4096, 14336, 32, 32, 8, 128, 1e6, 32768, 2, 1e-5), {"num_local_experts": 8},
    ),
    "deepseek-v3": (
        "deepseek_v3", (129280, 7168, 18432, 61, 128, 128, 128, 1e4, 163840, 8, 1e-6),
        {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048,
         "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512},
    ),
    "glm-4.5-air": (
        "glm4_moe", (151552, 4096, 10944, 46, 96, 8, 128, 1e6, 131072, 8, 1e-5),
        {"n_routed_experts": 128, "n_shared_experts": 1, "moe_intermediate_size": 1408, "n_group": 1,
         "first_k_dense_replace": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
         "rope_scaling": None, "use_qk_norm": False, "attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "minimax-m2": (
        "minimax", (200064, 3072, 1536, 62, 48, 8, 128, 5e6, 196608, 8, 1e-6),
        {"num_local_experts": 256, "shared_intermediate_size": 0, "rotary_dim": 64},
    ),
}  # fmt: skip


def names() -> list[str]:
    """The shapes there are, smallest first within a family."""
    return [*_MODELS, *_MIXTURES]


def config(name: str, blocks: int | None = None) -> dict[str, Any]:
    """The config.json, as far as shapes go, of the model called `name`.

    blocks: build only so many of its transformer blocks. Raises UsageError for an unknown name.
    """
    if name not in names():
        raise UsageError(f"there is no shape {name!r}", f"use one of {', '.join(names())}")
    result = _mixture(*_MIXTURES[name]) if name in _MIXTURES else _dense(*_MODELS[name])
    if blocks is not None:
        if not 1 <= blocks <= result["num_hidden_layers"]:
            raise UsageError(
                f"--blocks {blocks}: {name} has {result['num_hidden_layers']} blocks",
                "give fewer, at least 1",
            )
        result["num_hidden_layers"] = blocks
    return result


def _dense(model_type: str, dtype: str, tied: bool, values: tuple[float, ...]) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(_KEYS, values, strict=True))
    eps = 1e-6 if model_type in ("qwen2", "qwen3") else 1e-5
    return found | {
        "model_type": model_type, "torch_dtype": dtype, "tie_word_embeddings": tied, "rms_norm_eps": eps,
    }  # fmt: skip


def _mixture(model_type: str, values: tuple[float, ...], more: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(_OF_MIXTURES, values, strict=True))
    return found | {
        "model_type": model_type, "torch_dtype": "bfloat16", "tie_word_embeddings": False, **more,
    }  # fmt: skip
