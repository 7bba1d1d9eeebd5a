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


def names() -> list[str]:
    """The shapes there are, smallest first within a family."""
    return list(_MODELS)


def config(name: str, blocks: int | None = None) -> dict[str, Any]:
    """The config.json, as far as shapes go, of the model called `name`.

    blocks: build only so many of its transformer blocks. Raises UsageError for an unknown name.
    """
    if name not in _MODELS:
        raise UsageError(f"there is no shape {name!r}", f"use one of {', '.join(_MODELS)}")
    model_type, dtype, tied, values = _MODELS[name]
    result: dict[str, Any] = dict(zip(_KEYS, values, strict=True))
    result.update(model_type=model_type, torch_dtype=dtype, tie_word_embeddings=tied)
    result["rms_norm_eps"] = 1e-6 if model_type == "qwen3" else 1e-5
    if model_type == "qwen2":
        result["rms_norm_eps"] = 1e-6
    if blocks is not None:
        if not 1 <= blocks <= result["num_hidden_layers"]:
            raise UsageError(
                f"--blocks {blocks}: {name} has {result['num_hidden_layers']} blocks",
                "give fewer, at least 1",
            )
        result["num_hidden_layers"] = blocks
    return result
