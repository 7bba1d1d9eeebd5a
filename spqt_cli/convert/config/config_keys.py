"""Keys of config.json in the spelling that mlx-lm's class of an architecture reads.

transformers and its older releases spell rotary positions, windows and ties in several ways; a class of
mlx-lm's reads one of them and drops the others without a word. `spell` writes what is meant in the class's
own. Whether the class then does it is looked at on the built model (`settle`).
"""

import dataclasses
import sys
from typing import Any

from spqt_cli.convert.config.definition import Definition

# Names that mlx-lm's classes have for the base, for the share of a head that is turned, for a local base.
BASES = ("rope_theta", "rotary_emb_base")
SHARES = ("partial_rotary_factor", "rotary_pct")
LOCAL_BASES = ("rope_local_base_freq",)
NEEDS_SCALING = {"deepseek_v2", "minicpm3"}  # modules that look into rope_scaling without asking for it
NESTED = {"gemma4_text", "laguna", "mellum", "spark2_5"}  # modules that read rope_parameters by layer type
# Module of mlx-lm -> fields of its ModelArgs that nothing reads (docs/config-keys.md has every class).
IGNORED: dict[str, set[str]] = {
    "apertus": {"attention_bias", "qk_norm", "post_norm"},
    "dots1": {"attention_bias"},
    "muse_glimmer": {"hidden_activation"},
    "nemotron": {"hidden_act"},
    "recurrent_gemma": {"attention_bias"},
}
# Module -> keys that its ModelArgs demands and that transformers never writes.
FIXED: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "exaone4": {"rope_scaling": None},
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "llama4": {"rope_scaling": None},
    "minimax": {"shared_intermediate_size": 0},
    "qwen3_moe": {"norm_topk_prob": True},  # of qwen3_vl_moe
}
# Key that a class demands -> the key under which transformers writes the same.
ALIASES = {"n_ctx": "n_positions", "block_dim": "hidden_size", "num_experts": "num_local_experts"}
# Where one of these is missing, the config is damaged rather than an old one.
SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "model_type", "moe_intermediate_size", "n_embd", "n_layer", "n_head", "d_model", "n_layers", "n_heads",
}  # fmt: skip
_ABSENT = object()


def language_part(config: dict[str, Any], args_class: Any) -> dict[str, Any]:
    """The part of config.json that describes the language model: the dict itself, not a copy."""
    from mlx_lm.models.base import BaseModelArgs

    inner, own = config.get("text_config"), BaseModelArgs.__dict__["from_dict"].__func__
    flat = "text_config" not in _names(args_class) and getattr(args_class.from_dict, "__func__", own) is own
    return config if flat or not isinstance(inner, dict) else inner


def reads(args_class: Any) -> set[str]:
    """Keys of the language model's config that mlx-lm's class reads."""
    return set().union(*(_names(kind) - IGNORED.get(name, set()) for name, kind in _readers(args_class)))


def spell(inner: dict[str, Any], meant: Definition, args_class: Any) -> None:
    """Write what is meant into `inner` as the class reads it; `meant` was read from the same config."""
    keys = reads(args_class)
    _fill(inner, meant, args_class, keys)
    for key in ("layer_types", "no_rope_layers"):
        if key in keys and inner.get(key) is None and (value := getattr(meant, key)) is not None:
            inner[key] = value
    if meant.layer_types:
        _spell_pattern(inner, meant.layer_types, keys)
    names = {name for name, _ in _readers(args_class)}
    if "granitemoehybrid" in names and isinstance(inner.get("layer_types"), list):
        old = {"linear_attention": "mamba", "full_attention": "attention"}  # before transformers 5.13
        inner["layer_types"] = [old.get(str(kind), kind) for kind in inner["layer_types"]]
    _spell_rope(inner, meant, keys, nested=bool(names & NESTED))
    if names & NEEDS_SCALING and inner.get("rope_scaling") is None:
        inner["rope_scaling"] = _plain_yarn(meant.longest)


def _names(kind: Any) -> set[str]:
    return {one.name for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def _readers(args_class: Any) -> list[tuple[str, Any]]:
    """(module's name, dataclass) of what reads the language model's config; several where it may be any."""
    module: Any = sys.modules[args_class.__module__]
    if "text_config" not in _names(args_class):
        return [(_short(module), args_class)]
    own = [vars(module)[name] for name in ("TextArgs", "TextConfig", "TextModelArgs") if name in vars(module)]
    if own:
        return [(_short(module), own[0])]
    parts = [value for value in vars(module).values() if hasattr(value, "ModelArgs") and value is not module]
    if parts:
        return [(_short(part), part.ModelArgs) for part in parts]
    base: Any = sys.modules[module.Model.__mro__[1].__module__]  # of a class that only renames tensors
    return [(_short(base), getattr(base, "TextModelArgs", args_class))]


def _short(module: Any) -> str:
    return str(module.__name__).rpartition(".")[2]


def _fill(inner: dict[str, Any], meant: Definition, args_class: Any, keys: set[str]) -> None:
    """Write transformers' default where config.json leaves a key out: the class's may be another."""
    for _, kind in _readers(args_class):
        for key in _names(kind) & ALIASES.keys() - inner.keys():
            if ALIASES[key] in inner and key not in SIZES:
                inner[key] = inner[ALIASES[key]]
    for key in keys - inner.keys() - SIZES - {"tie_word_embeddings"}:
        value = (meant.defaults or {}).get(key, _ABSENT)
        if value is None or isinstance(value, (bool, int, float, str)):
            inner[key] = value
    for name, _ in _readers(args_class):
        for key, value in FIXED.get(name, {}).items():
            inner.setdefault(key, value)
    longrope = any(
        rope.get("rope_type") == "longrope" for rope in meant.ropes
    )  # transformers checks its length
    if ("head_dim" in keys or longrope) and inner.get("head_dim") is None and meant.head_dim:
        inner["head_dim"] = meant.head_dim
    if "n_inner" in keys and inner.get("n_inner") is None and "n_embd" in inner:
        inner["n_inner"] = 4 * inner["n_embd"]
    if "intermediate_size" in keys and {"expand", "hidden_size"} <= inner.keys():
        inner.setdefault("intermediate_size", inner["expand"] * inner["hidden_size"])


def _spell_pattern(inner: dict[str, Any], types: list[str], keys: set[str]) -> None:
    """A repeating pattern of layers, from their types."""
    full = [kind == "full_attention" for kind in types]
    every = (
        full.index(True) + 1 if True in full else 1
    )  # classes look for a full layer: `exact` puts windows in
    if "full_attention_interval" in keys:
        inner["full_attention_interval"] = every
    if inner.get("model_type") == "exaone4":
        mixed = len(set(full)) == 2
        inner["sliding_window_pattern"] = "".join("G" if each else "L" for each in full) if mixed else None
    elif "sliding_window_pattern" in keys and "layer_types" not in keys:
        inner["sliding_window_pattern"] = every


def _spell_rope(inner: dict[str, Any], meant: Definition, keys: set[str], *, nested: bool) -> None:
    by_type = dict(zip(meant.layer_types or [], meant.ropes, strict=False))
    full = by_type.get("full_attention") or next((rope for rope in meant.ropes if rope), None)
    if not full or not isinstance(full.get("rope_theta"), (int, float)):
        return
    inner.pop("rope_parameters", None)
    inner.pop("rope_scaling", None)
    if "rope_parameters" in keys:
        by_type = {kind: _both(rope) for kind, rope in by_type.items() if rope}
        inner["rope_parameters"] = by_type if nested else _both(full)
    if "rope_scaling" in keys:
        scaled = _both(full)
        inner["rope_scaling"] = None if scaled["type"] in ("default", "mrope") else scaled
    local = by_type.get("sliding_attention") or {}
    for names, value in (
        (BASES, full["rope_theta"]),
        (LOCAL_BASES, local.get("rope_theta")),
        (SHARES, full.get("partial_rotary_factor")),
    ):
        for key in names:
            if key in keys and value is not None:
                inner[key] = value
    if isinstance(inner.get("attn_config"), dict) and "attn_config" in keys:  # dbrx
        inner["attn_config"].setdefault("rope_theta", full["rope_theta"])
    share = full.get("partial_rotary_factor")
    if "rotary_dim" in keys and inner.get("rotary_dim") is None and share is not None:
        inner["rotary_dim"] = int(meant.head_dim * share)
    original = full.get("original_max_position_embeddings")
    if "original_max_position_embeddings" in keys and original is not None:
        inner["original_max_position_embeddings"] = original


def _both(rope: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters under both names of the kind; some classes assert that the factor is a float."""
    kept = {key: value for key, value in rope.items() if value is not None}
    if isinstance(kept.get("factor"), int) and not isinstance(kept["factor"], bool):
        kept["factor"] = float(kept["factor"])
    kind = kept.get("rope_type", kept.get("type", "default"))
    return {**kept, "type": kind, "rope_type": kind}


def _plain_yarn(longest: int | None) -> dict[str, Any]:
    """A scaling by 1."""
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": longest or 1,
    }


def without_scaling(inner: dict[str, Any], args_class: Any, longest: int | None) -> None:
    """Leave the scaling out, for a class that has not this kind of it: the ropes are replaced afterwards."""
    if "rope_scaling" in reads(args_class):
        needed = any(name in NEEDS_SCALING for name, _ in _readers(args_class))
        inner["rope_scaling"] = _plain_yarn(longest) if needed else None
    rope = inner.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        inner["rope_parameters"] = {**kept, "type": "default", "rope_type": "default"}
