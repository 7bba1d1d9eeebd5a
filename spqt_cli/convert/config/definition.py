"""What a config.json means, by transformers' own config class: rotary positions, windows, defaults.

transformers fills in each architecture's defaults and turns old spellings into new ones. Only the keys below
are given to it, so that a hostile config can't make it build something large. Where transformers has no such
class the plain keys count. It knows nothing of what mlx-lm reads.
"""

from dataclasses import dataclass, field, replace
from typing import Any

# Keys that transformers' classes take as they stand, and keys of old configs that they turn into others.
GIVEN = (
    "rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "hidden_size",
     "num_attention_heads", "num_hidden_layers", "layer_types", "sliding_window",
    "use_sliding_window", "max_window_layers", "attention_chunk_size", "no_rope_layers",
    "no_rope_layer_interval", "qk_rope_head_dim", "qk_nope_head_dim", "global_head_dim",
    "tie_word_embeddings", "d_model", "n_heads", "n_embd", "n_head",
)  # fmt: skip
OLD = (
    "head_dim",
    "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rotary_dim",
    "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval",
)  # fmt: skip
# The names that configs have for the same sizes.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
WIDTHS = ("hidden_size", "n_embd", "d_model", "hidden_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass
class Definition:
    """A language model's config as it is meant.

    ropes: rope_parameters of each layer, empty where nothing says them. windows: tokens that each layer sees,
    None for all. chunk: tokens of the chunks in which some layers see. head_dim: width of a head, as far as
    it is turned. tied: whether the head is the embedding, None where that isn't said. defaults: what
    transformers has for a key that config.json leaves out, None where it has no such class or the class
    refuses the values: then `refused`.
    """

    ropes: list[dict[str, Any]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    chunk: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    head_dim: int = 0
    longest: int | None = None
    tied: bool | None = None
    defaults: dict[str, Any] | None = None
    refused: bool = False


def read(config: dict[str, Any], inner: dict[str, Any]) -> Definition:
    """The meaning of a config. inner: its part for the language model, often the config itself."""
    import transformers

    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its advice is for those who write configs
    try:
        return _read(config, inner)
    finally:
        transformers.logging.set_verbosity(said)


def _read(config: dict[str, Any], inner: dict[str, Any]) -> Definition:
    kind = _kind(config, inner)
    layers = _first(inner, DEPTHS) or 0
    tied = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if kind is None:
        return _plain(inner, layers, tied)
    plain, values = _of_transformers(kind, inner)
    if values is None:
        return replace(_plain(inner, layers, tied), refused=True)
    types = values.get("layer_types")
    types = list(types) if isinstance(types, (list, tuple)) and len(types) == layers else None
    no_rope = values.get("no_rope_layers")
    return Definition(
        ropes=_ropes(values.get("rope_parameters") or {}, types, layers),
        windows=_windows(values, types, layers),
        chunk=whole(values.get("attention_chunk_size")),
        layer_types=types,
        no_rope_layers=no_rope if isinstance(no_rope, list) and len(no_rope) == layers else None,
        head_dim=_head_dim(values),
        longest=whole(values.get("max_position_embeddings")),
        tied=plain.get("tie_word_embeddings") if tied is None else bool(tied),
        defaults={key: value for key, value in plain.items() if key != "head_dim"},
    )


def whole(value: Any) -> int | None:
    """value where it is a positive whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _kind(config: dict[str, Any], inner: dict[str, Any]) -> str | None:
    """transformers' name of the language model, None where it has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = inner.get("model_type")
    if inner is config or not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        outer = config.get("model_type")
        if not isinstance(outer, str) or outer not in CONFIG_MAPPING:
            return None
        kind = CONFIG_MAPPING[outer]().get_text_config().model_type
    return kind if kind in CONFIG_MAPPING else None


def _of_transformers(kind: str, inner: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the class's defaults, what it makes of the given keys): None where it refuses them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plain = CONFIG_MAPPING[kind]().to_dict()
    given = {
        key: _copy(inner[key])
        for key in (*GIVEN, *OLD)
        if inner.get(key) is not None and (key in OLD or key in plain)
    }
    if inner.get("sliding_window", 0) is None and "sliding_window" in plain:
        given["sliding_window"] = None
    if plain.get("head_dim", 0) is None and "qk_rope_head_dim" not in plain and _head_dim(inner):
        given["head_dim"] = _head_dim(inner)  # transformers' own checks of longrope need it
    try:
        return plain, CONFIG_MAPPING[kind](**given).to_dict()
    except Exception:  # another library's checks of strange values: they may raise anything
        return plain, None


def _copy(value: Any) -> Any:
    """A copy two levels deep, since transformers fills in what it is given; `rope_type` beside `type`."""
    if not isinstance(value, dict):
        return value
    copied = {key: dict(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}
    for rope in (copied, *(inner for inner in copied.values() if isinstance(inner, dict))):
        if "type" in rope:  # some of transformers' classes overlook it
            kind = rope.get("rope_type", rope["type"])
            rope["rope_type"] = {"su": "longrope", "mrope": "default"}.get(str(kind), kind)
    return copied


def _ropes(rope: dict[str, Any], types: list[str] | None, layers: int) -> list[dict[str, Any]]:
    nested = {key: inner for key, inner in rope.items() if isinstance(inner, dict)}
    if not nested:
        return [rope] * layers if rope else []
    if types is None:
        return []
    return [nested.get(kind, {}) for kind in types]


def _windows(values: dict[str, Any], types: list[str] | None, layers: int) -> list[int | None]:
    window = whole(values.get("sliding_window"))
    if values.get("use_sliding_window") is False:
        window = None
    if types is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in types]


def _head_dim(values: dict[str, Any]) -> int:
    hidden, heads = _first(values, WIDTHS), _first(values, HEADS)
    own = whole(values.get("head_dim")) or whole(values.get("qk_rope_head_dim"))
    return own or (hidden // heads if hidden and heads else 0)


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((count for name in names if (count := whole(values.get(name)))), None)


def _plain(inner: dict[str, Any], layers: int, tied: Any) -> Definition:
    """A config that transformers has no class for, read as most architectures mean it."""
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, dict) else {}
    if any(isinstance(value, dict) for value in rope.values()):
        rope = {}
    base = rope.get("rope_theta", inner.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", inner.get("partial_rotary_factor"))
    rope |= {"rope_type": kind, "rope_theta": base}
    if share is not None:
        rope["partial_rotary_factor"] = share
    window = None if inner.get("use_sliding_window") is False else whole(inner.get("sliding_window"))
    types = inner.get("layer_types")
    return Definition(
        ropes=[rope] * layers if isinstance(base, (int, float)) else [],
        windows=[window] * layers if not isinstance(types, list) else [],
        head_dim=_head_dim(inner),
        longest=whole(inner.get("max_position_embeddings")),
        tied=None if tied is None else bool(tied),
    )
