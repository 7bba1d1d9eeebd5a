"""A checkpoint's config, settled: spelled as mlx-lm's class reads it; what that drops is put in or refused.

The class is judged by its deeds: the rotary modules and caches of the built model are held against what the
config means. Where they differ, the output's `spqt` section says what `exact` is to put in; what can't be put
in is refused by name, and what matters only beyond a length is told.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.convert.config import config_keys, definition, dropped, rope_definition
from spqt_cli.convert.config.definition import Definition
from spqt_cli.convert.source import DTYPES, Checkpoint
from spqt_cli.decode import exact
from spqt_cli.decode.architecture import classes
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files

Build = Callable[[dict[str, Any]], nn.Module]
SHORTEST = 256  # tokens: a model that is right only for fewer is refused
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
TOWER = re.compile(r"(^|[._])(vision|visual|audio|image|speech)([._]|$)")
EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embeddings|tok_embeddings|embed_in)\.weight$")
OWN_DIMS = {"rotary_dim", "global_head_dim"}  # what is turned has a width of its own, which the class reads
# Keys of layers that turn otherwise than the rest, in classes of which transformers knows nothing.
MIXED = {"layer_types", "rope_local_base_freq", "rope_local_theta", "swa_rope_theta", "compress_rope_theta",
         "sliding_window_pattern", "sliding_window_layers", "block_configs"}  # fmt: skip


def settle(checkpoint: Checkpoint, build: Build) -> None:
    """Settle the checkpoint's config, and note what `exact` is to add and warnings.

    build: makes mlx-lm's model of a config, and raises SpqtError where it can't.
    Raises UnsupportedError where a key changes results and can't be honoured.
    """
    config = copy.deepcopy(checkpoint.config)
    _, args_class = classes(config, checkpoint.name)
    inner = config_keys.language_part(config, args_class)
    for key in ("rope_scaling", "rope_parameters"):
        if inner.get(key) is not None and not isinstance(inner[key], dict):
            raise SpqtError(f"{checkpoint.name}: {key} in config.json is not an object", AGAIN)
    _check_bases(inner, checkpoint.name)
    _check_layer_types(inner, checkpoint.name)
    meant = definition.read(config, inner)
    keys = config_keys.reads(args_class)
    if not meant.ropes and _by_layer_type(inner) and "rope_parameters" not in keys:
        raise UnsupportedError(
            f"{checkpoint.name}: rope_parameters by layer type, and the architecture has no layer types",
            _ROPE_HINT,
        )
    dropped.refuse(inner, meant, keys, checkpoint.name)
    config_keys.spell(inner, meant, args_class)
    _refuse_unknown(config, inner, meant, args_class, checkpoint.name)
    _settle_head(config, inner, meant, keys, checkpoint)
    try:
        model = build(config)
    except SpqtError:
        if all(rope.get("rope_type", "default") == "default" for rope in meant.ropes):
            raise
        config_keys.without_scaling(inner, args_class, meant.longest)
        model = build(config)
    ropes, limit = _ropes(model, meant, keys, checkpoint.name)
    windows, shorter = _windows(model, meant, keys)
    limit = min((each for each in (limit, shorter) if each is not None), default=None)
    _check_head(model, checkpoint)
    limit = _useful(limit, meant, checkpoint)
    wanted = {"ropes": ropes, "windows": windows, "context": limit}
    checkpoint.exact = {key: value for key, value in wanted.items() if value}
    checkpoint.config = config


def _check_bases(inner: dict[str, Any], name: str) -> None:
    """Raise SpqtError for a base of rotary positions that is no positive number."""
    for at in (inner, inner.get("rope_parameters"), inner.get("rope_scaling"), *_by_layer_type(inner)):
        base = at.get("rope_theta") if isinstance(at, dict) else None
        if base is None:
            continue
        if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 < base < math.inf:
            raise SpqtError(f"{name}: rope_theta is {base!r:.40}, no positive number", AGAIN)


def _check_layer_types(inner: dict[str, Any], name: str) -> None:
    """Raise SpqtError for layer types that are no list of names."""
    types = inner.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(one, str) for one in types)):
        raise SpqtError(f"{name}: config.json: 'layer_types' is {types!r:.40}, not a list of names", AGAIN)


def _by_layer_type(inner: dict[str, Any]) -> list[dict[str, Any]]:
    ropes = inner.get("rope_parameters")
    return [each for each in ropes.values() if isinstance(each, dict)] if isinstance(ropes, dict) else []


def _refuse_unknown(
    config: dict[str, Any], inner: dict[str, Any], meant: Definition, args_class: Any, name: str
) -> None:
    """Refuse a config of transformers' for which mlx-lm's class wants keys of another."""
    required = {
        one.name
        for one in dataclasses.fields(args_class)
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }
    if meant.defaults is not None and inner is config and "text_config" in required - meant.defaults.keys():
        raise UnsupportedError(
            f"{name}: a {inner.get('model_type')} config without text_config has no language model",
            "give the whole model, of which this is a part",
        )
    if meant.defaults is None or "text_config" in required:
        return
    if missing := required - inner.keys() - meant.defaults.keys():
        raise UnsupportedError(
            f"{name}: mlx-lm's class of {inner.get('model_type')} wants {checkpoint_files.named(missing)},"
            " which transformers' config does not have",
            "use a checkpoint in the form that mlx-lm's class was written for",
        )


def _ropes(
    model: nn.Module, meant: Definition, keys: set[str], name: str
) -> tuple[list[dict[str, Any]], int | None]:
    """(rotary modules to replace, tokens up to which all hold)."""
    alike = all(rope == meant.ropes[0] for rope in meant.ropes)
    unknown = meant.defaults is None and (keys & MIXED or not alike)
    if not meant.ropes or not meant.head_dim or keys & OWN_DIMS or unknown:
        return [], None
    found: list[dict[str, Any]] = []
    limits, seen = [], False
    for path, turning, _ in rope_definition.built(model):
        layer = LAYER.search(path)
        if TOWER.search(path) or (layer is None and not alike):
            continue
        seen, rope = True, meant.ropes[int(layer[1]) if layer else 0]
        wanted = _wanted(rope, meant, name)
        if wanted is None:
            continue
        if wanted.limit is not None:
            limits.append(wanted.limit)
        if not turning.equals(wanted):
            if meant.defaults is None:
                raise UnsupportedError(
                    f"{name}: mlx-lm's class turns otherwise than {_said(rope)}", _ROPE_HINT
                )
            _note_rope(found, path, wanted)
    kinds = {rope.get("rope_type", "default") for rope in meant.ropes} - {"default", "mrope"}
    if not seen and kinds and not keys & {"rope_scaling", "rope_parameters"}:
        raise UnsupportedError(f"{name}: mlx-lm's class has no rope_type {kinds.pop()!r}", _ROPE_HINT)
    return found, min(limits, default=None)


_ROPE_HINT = "spqt converts what mlx-lm's own class can compute"


def _said(rope: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}"[:60] for key, value in rope.items() if value is not None)


def _wanted(rope: dict[str, Any], meant: Definition, name: str) -> rope_definition.Turning | None:
    if not rope:
        return None
    try:
        return rope_definition.wanted(rope, meant.head_dim, meant.longest)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        if meant.defaults is None and not meant.refused:
            return None
        raise UnsupportedError(f"{name}: rotary positions by {_said(rope)} ({error!r})", _ROPE_HINT) from None


def _note_rope(found: list[dict[str, Any]], path: str, wanted: rope_definition.Turning) -> None:
    angles = wanted.angles.tolist()
    for entry in found:
        if entry["angles"] == angles and entry["scale"] == wanted.scale:
            entry["paths"].append(path)
            return
    found.append({"paths": [path], "angles": angles, "scale": wanted.scale})


def _windows(
    model: nn.Module, meant: Definition, keys: set[str]
) -> tuple[list[int | None] | None, int | None]:
    """(windows of all layers where the class has not these, tokens up to which they don't matter)."""
    from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

    if not meant.windows or "attention_window_size" in keys:
        return None, None
    if meant.defaults is None and keys & {"sliding_window", *MIXED}:
        return None, None
    caches = make_prompt_cache(model)
    chunk = None if any(type(each) is ChunkedKVCache for each in caches) else meant.chunk
    longest = meant.longest or 1 << 62
    wanted = [None if window is None or window >= longest else window for window in meant.windows]
    differing = []
    for cache, window in zip(caches, wanted, strict=False):
        if type(cache) in (KVCache, RotatingKVCache):
            has = getattr(cache, "max_size", None)
            if has != window and (window is not None or (has is not None and has < longest)):
                differing += [each for each in (has, window) if each is not None]
    if not differing:
        return None, chunk
    layers, plain = (
        exact.windowed_layers(model),
        all(type(each) in (KVCache, RotatingKVCache) for each in caches),
    )
    if layers is not None and plain and len(layers) == len(caches) == len(wanted):
        return wanted, chunk
    return None, min(differing + ([chunk] if chunk else []))


def _useful(limit: int | None, meant: Definition, checkpoint: Checkpoint) -> int | None:
    """The length up to which the model is right, where that is shorter than its context; warns of it."""
    if limit is None or (meant.longest is not None and limit >= meant.longest):
        return None
    what = "sliding_window, attention_chunk_size or longrope in config.json"
    if limit < SHORTEST:
        raise UnsupportedError(
            f"{checkpoint.name}: mlx-lm's class is right only up to {limit} tokens ({what})",
            "texts so short are of no use",
        )
    checkpoint.warnings.append(f"right up to {limit} tokens and kept to them: mlx-lm's class lacks {what}")
    return limit


def _settle_head(
    config: dict[str, Any], inner: dict[str, Any], meant: Definition, keys: set[str], checkpoint: Checkpoint
) -> None:
    """Let the config say tied where the head is the embedding, and not where another one is stored."""
    head = _stored_head(checkpoint)
    said = any("tie_word_embeddings" in part for part in (config, inner))
    if "tie_word_embeddings" not in keys and (head is None or not said):
        return  # such a class has a head where one is stored
    if head is None and (said or meant.defaults is None):
        if "tie_word_embeddings" not in inner and meant.tied is not None:
            inner["tie_word_embeddings"] = meant.tied
        return
    tied = head is None or bool(meant.tied and is_embedding(checkpoint, head))
    if head is not None and meant.tied and not tied and said:
        checkpoint.warnings.append(f"config.json says tie_word_embeddings, but {head} is another: it is kept")
    inner["tie_word_embeddings"] = tied
    if "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = tied


def _stored_head(checkpoint: Checkpoint) -> str | None:
    return next((name for name in checkpoint.tensors if name.endswith("lm_head.weight")), None)


def is_embedding(checkpoint: Checkpoint, head: str) -> bool:
    """Whether a stored head is the embedding once more."""
    tensors = checkpoint.tensors
    same = [
        name
        for name in tensors
        if EMBEDDING.search(name)
        and (tensors[name].shape, tensors[name].dtype) == (tensors[head].shape, tensors[head].dtype)
    ]
    if tensors[head].dtype not in DTYPES or not same:
        return False
    lazy = checkpoint.weights()
    return any(bool(mx.array_equal(lazy[name], lazy[head]).item()) for name in same)


def _check_head(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse where a stored head that is not the embedding has no place in the model."""
    head = _stored_head(checkpoint)
    if head is None or any(path.endswith("lm_head") for path, _ in model.named_modules()):
        return
    if "lm_head" not in model and not is_embedding(checkpoint, head):
        raise UnsupportedError(
            f"{checkpoint.name}: mlx-lm's class ties the head to the embedding, and {head} is another",
            "spqt converts what mlx-lm's own class can compute",
        )
