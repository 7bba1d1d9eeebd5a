"""config.json of the model in a .gguf file, in the words of HF and mlx-lm.

Owns the meaning of the metadata of each architecture. Reads no weight but the factors it is handed.
"""

from typing import Any

import numpy as np

from spqt_cli.convert.gguf.file import ORIGINAL, Header
from spqt_cli.convert.gguf.metadata import Metadata
from spqt_cli.convert.gguf.names import ATTENTION, MLP, biased
from spqt_cli.convert.gguf.rope import scaling
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
QUANTIZATION_VERSION = 2
GEMMA3_PATTERN = 6  # every sixth layer sees everything, unless a key says otherwise
GEMMA3_LARGE = 62  # layers of the one gemma3 size whose queries are scaled by hidden size / heads


def architecture(header: Header) -> str:
    """The file's architecture; refused unless spqt reads it and the file is a model."""
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise SpqtError(f"{header.path} lacks general.architecture", AGAIN)
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{header.path} has the architecture {arch[:40]!r}", f"spqt reads {', '.join(ARCHITECTURES)}"
        )
    if (kind := str(header.metadata.get("general.type", "model"))) != "model":
        raise UnsupportedError(f"{header.path} is no model but of the type {kind[:40]!r}", "give a model")
    version = header.metadata.get("general.quantization_version", QUANTIZATION_VERSION)
    if str(version) != str(QUANTIZATION_VERSION):
        raise UnsupportedError(
            f"{header.path} has general.quantization_version {str(version)[:40]}, not 2", ORIGINAL
        )
    return arch


def build(header: Header, arch: str, factors: np.ndarray | None) -> dict[str, Any]:
    """The configuration without token ids and dtype; unknown keys are refused.

    factors: float32 [head_dim / 2], the tensor rope_freqs.weight, or None.
    """
    metadata = Metadata(header, arch)
    config = _sizes(header, metadata)
    config["model_type"], kind = ARCHITECTURES[arch]
    config["architectures"] = [kind]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["rope_scaling"] = scaling(
        metadata, config["rope_theta"], config["head_dim"], config["max_position_embeddings"], factors
    )
    config |= {"llama": _llama, "qwen2": _qwen2, "gemma3": _gemma3}[arch](header, metadata, config)
    metadata.refuse_unused(other=("tokenizer.",))
    return config


def _sizes(header: Header, metadata: Metadata) -> dict[str, Any]:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise SpqtError(f"{header.path} lacks tensors: token_embd.weight", AGAIN)
    layers, heads = metadata.size("block_count"), metadata.size("attention.head_count")
    hidden = metadata.size("embedding_length")
    if layers > len(header.tensors):
        raise SpqtError(f"{header.path} declares {layers} blocks and {len(header.tensors)} tensors", AGAIN)
    keys = metadata.size("attention.head_count_kv", heads)
    head = metadata.size("attention.key_length", hidden // heads or 1)
    if heads % keys or head % 2:
        raise SpqtError(f"{header.path} declares {heads} heads, {keys} key heads of {head} values", AGAIN)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (length := metadata.size(key, head)) != head:
            raise UnsupportedError(
                f"{header.path}: {key} is {length}, the heads have {head} values", ORIGINAL
            )
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": metadata.size("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real("rope.freq_base", 10000.0),
    }


def _refuse_window(metadata: Metadata, config: dict[str, Any]) -> None:
    """A window as long as the context hides nothing; a shorter one has no place in these models."""
    window = _window(metadata)
    if 0 < window < config["max_position_embeddings"]:
        raise UnsupportedError(
            f"{metadata.path}: {metadata.arch}.attention.sliding_window is {window}", ORIGINAL
        )


def _window(metadata: Metadata) -> int:
    """The sliding window's length in tokens; 0 for none."""
    value = metadata.raw("attention.sliding_window")
    return (
        0
        if value is None or (type(value) is int and value == 0)
        else metadata.size("attention.sliding_window")
    )


def _llama(header: Header, metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    _refuse_window(metadata, config)
    layers = config["num_hidden_layers"]
    return {
        "hidden_act": "silu",
        "attention_bias": biased(header, layers, ATTENTION),
        "mlp_bias": biased(header, layers, MLP),
    }


def _qwen2(_: Header, metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    _refuse_window(metadata, config)
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedError(
            f"{metadata.path}: qwen2 heads of {config['head_dim']} values don't fill the size", ORIGINAL
        )
    return {"hidden_act": "silu", "use_sliding_window": False}


def _gemma3(_: Header, metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers, head = config["num_hidden_layers"], config["head_dim"]
    window, pattern = _window(metadata), _pattern(metadata, layers)
    if not window:
        window, pattern = config["max_position_embeddings"], 1
    if pattern > layers:
        raise UnsupportedError(
            f"{metadata.path}: {layers} layers are fewer than one pattern of {pattern}", ORIGINAL
        )
    scalar = config["hidden_size"] / config["num_attention_heads"] if layers == GEMMA3_LARGE else head
    if scale := metadata.real("attention.scale", 0.0):
        scalar = scale**-2
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": metadata.real("rope.freq_base_swa", 10000.0),
        "sliding_window": window,
        "sliding_window_pattern": pattern,
        "layer_types": kinds,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _pattern(metadata: Metadata, layers: int) -> int:
    """Every how many layers one sees everything; the key is a number, or a flag for each layer."""
    value = metadata.raw("attention.sliding_window_pattern")
    if value is None:
        return GEMMA3_PATTERN
    if not isinstance(value, np.ndarray):
        return metadata.size("attention.sliding_window_pattern")
    sliding = [bool(flag) for flag in value]
    for pattern in range(1, layers + 1):
        if sliding == [(i + 1) % pattern != 0 for i in range(layers)]:
            return pattern
    raise UnsupportedError(f"{metadata.path}: its sliding layers do not repeat in one pattern", ORIGINAL)
