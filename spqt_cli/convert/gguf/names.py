"""Which stored tensor of a .gguf file holds which tensor of an HF checkpoint, and what was done to it.

The standard converter interleaved the rotary halves of llama's q and k rows and added 1 to gemma's
norms; `Origin` says so, for the reader to undo. Every tensor has to be used, and none may be missing.
"""

from dataclasses import dataclass
from typing import Any

from spqt_cli.convert.gguf.file import Header
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

MOST_NAMED = 10
ROPE_FACTORS = "rope_freqs.weight"  # read with the configuration, where llama's rotation is settled

# stored name -> HF name, outputs, inputs; sizes by the keys of `_sizes`
PROJECTIONS = {
    "attn_q": ("self_attn.q_proj", "queries", "hidden"),
    "attn_k": ("self_attn.k_proj", "keys", "hidden"),
    "attn_v": ("self_attn.v_proj", "keys", "hidden"),
    "attn_output": ("self_attn.o_proj", "hidden", "queries"),
    "ffn_gate": ("mlp.gate_proj", "inner", "hidden"),
    "ffn_up": ("mlp.up_proj", "inner", "hidden"),
    "ffn_down": ("mlp.down_proj", "hidden", "inner"),
}
PRE_NORM = {
    "attn_norm": ("input_layernorm", "hidden"),
    "ffn_norm": ("post_attention_layernorm", "hidden"),
}
NORMS = {
    "llama": PRE_NORM,
    "qwen2": PRE_NORM,
    "gemma3": {
        "attn_norm": ("input_layernorm", "hidden"),
        "attn_q_norm": ("self_attn.q_norm", "head"),
        "attn_k_norm": ("self_attn.k_norm", "head"),
        "post_attention_norm": ("post_attention_layernorm", "hidden"),
        "ffn_norm": ("pre_feedforward_layernorm", "hidden"),
        "post_ffw_norm": ("post_feedforward_layernorm", "hidden"),
    },
}
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Origin:
    """Where one HF tensor comes from.

    stored: the name in the file; None for a bias that the file leaves out, which is zeros. shape: of
    the HF tensor. heads: rows to take out of the interleaved order in so many heads; 0 for none.
    shift: added to each weight.
    """

    stored: str | None
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0


def biased(header: Header, blocks: int, names: tuple[str, ...]) -> bool:
    """True if any block has a bias on one of these projections."""
    return any(f"blk.{i}.{name}.bias" in header.tensors for i in range(blocks) for name in names)


def origins(header: Header, arch: str, config: dict[str, Any]) -> dict[str, Origin]:
    """Every tensor of the HF checkpoint by name, checked against the file: none missing, none left over."""
    size = _sizes(config)
    found = {
        "model.embed_tokens.weight": Origin("token_embd.weight", (size["vocab"], size["hidden"])),
        "model.norm.weight": _norm("output_norm.weight", size["hidden"], arch),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = Origin("output.weight", (size["vocab"], size["hidden"]))
    for block in range(config["num_hidden_layers"]):
        found |= _block(header, arch, config, block, size)
    _check(header, found, arch)
    return found


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    head = config["head_dim"]
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "head": head,
        "queries": config["num_attention_heads"] * head,
        "keys": config["num_key_value_heads"] * head,
    }


def _norm(stored: str, length: int, arch: str) -> Origin:
    return Origin(stored, (length,), shift=-1.0 if arch == "gemma3" else 0.0)


def _block(
    header: Header, arch: str, config: dict[str, Any], block: int, size: dict[str, int]
) -> dict[str, Origin]:
    found = {}
    for stored, (name, length) in NORMS[arch].items():
        origin = _norm(f"blk.{block}.{stored}.weight", size[length], arch)
        found[f"model.layers.{block}.{name}.weight"] = origin
    biases = _biases(arch, config)
    interleaved = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for stored, (name, outputs, inputs) in PROJECTIONS.items():
        heads = interleaved.get(stored, 0) if arch == "llama" else 0
        target, source = f"model.layers.{block}.{name}", f"blk.{block}.{stored}"
        found[f"{target}.weight"] = Origin(f"{source}.weight", (size[outputs], size[inputs]), heads)
        if stored in biases:
            bias = f"{source}.bias" if f"{source}.bias" in header.tensors else None
            found[f"{target}.bias"] = Origin(bias, (size[outputs],), heads)
    return found


def _biases(arch: str, config: dict[str, Any]) -> tuple[str, ...]:
    """The projections that have a bias in mlx-lm's model of this configuration."""
    if arch == "qwen2":
        return ATTENTION[:3]
    attention = ATTENTION if config.get("attention_bias") else ()
    return attention + (MLP if config.get("mlp_bias") else ())


def _check(header: Header, found: dict[str, Origin], arch: str) -> None:
    wanted = {origin.stored: origin for origin in found.values() if origin.stored}
    known = {*wanted, ROPE_FACTORS} if arch == "llama" else set(wanted)
    if extra := sorted(set(header.tensors) - known):
        raise UnsupportedError(
            f"{header.path} holds tensors that spqt has no use for in a {arch} model: {_named(extra)}",
            "leaving them out would change the model's results",
        )
    if missing := sorted(set(wanted) - set(header.tensors)):
        raise SpqtError(f"{header.path} lacks tensors: {_named(missing)}", AGAIN)
    for stored, origin in wanted.items():
        if (shape := header.tensors[stored].shape) != origin.shape:
            raise SpqtError(
                f"{header.path}: tensor {stored} has the shape {shape}, its metadata say {origin.shape}",
                AGAIN,
            )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
