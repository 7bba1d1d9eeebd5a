"""What a user may ask of one generation: a field per flag of `spqt generate`, with its default and range.

Making one of these objects checks its ranges, so a wrong value is refused before a model is loaded.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

from spqt_cli.errors import UsageError
from spqt_cli.format import config_json, layout

LARGEST_SEED = (1 << 64) - 1  # MLX's
_Kind = TypeVar("_Kind")


class Loading(TypedDict, total=False):
    """How a model is opened: the keyword arguments of `session.load`.

    sparsity: 0 to 0.95, with thresholds derived from the stored curves; None or left out: SPQT_SPARSITY
    where that is set, else the calibrated sparsity. dense: skip nothing, exact zeros included, and run every
    layer as it is stored; else each layer runs as this device's profile says. revision: of a hub id.
    trust_remote_code: accept a folder that brings code. adapter_path: folder of LoRA or DoRA adapters.
    draft_model: folder or hub id of a smaller model for speculative decoding. pipeline:
    load a part of the model where several processes were started together, all of which must do so: some of
    the layers, or, where it is False, a part of each; None or left out: the whole model.
    """

    sparsity: float | None
    dense: bool
    revision: str | None
    trust_remote_code: bool
    adapter_path: str | None
    draft_model: str | None
    pipeline: bool | None


def _ranged(default: Any, least: float, largest: float = math.inf) -> Any:
    """A field with a default and its least and largest value; ends included, None passes."""
    return field(default=default, metadata={"range": (least, largest)})


@dataclass
class _Ranged:
    """Options that refuse values out of range (UsageError, exit 2)."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, (least, largest) = getattr(self, one.name), one.metadata.get("range", (0, math.inf))
            if "range" in one.metadata and value is not None and not least <= value <= largest:  # or NaN
                wanted = f"at least {least:g}" if largest == math.inf else f"{least:g} to {largest:g}"
                raise UsageError(f"{_flag(one.name)} {value} is out of range", f"{wanted} is possible")


@dataclass
class Sampling(_Ranged):
    """How the next token is drawn; names and meanings are mlx-lm's. temp 0 takes the likeliest."""

    temp: float = _ranged(0.0, 0, 1e6)
    top_p: float = _ranged(1.0, 0, 1)
    min_p: float = _ranged(0.0, 0, 1)
    top_k: int = _ranged(0, 0)
    min_tokens_to_keep: int = _ranged(1, 1)
    xtc_probability: float = _ranged(0.0, 0, 1)
    xtc_threshold: float = _ranged(0.1, 0, 0.5)
    repetition_penalty: float | None = _ranged(None, 0, 1e6)
    presence_penalty: float | None = _ranged(None, -1e6, 1e6)
    frequency_penalty: float | None = _ranged(None, -1e6, 1e6)
    seed: int | None = _ranged(None, 0, LARGEST_SEED)


@dataclass
class Cache(_Ranged):
    """The key-value cache and how a prompt fills it, sizes in tokens; names and meanings are mlx-lm's."""

    max_kv_size: int | None = _ranged(None, 1)
    prefill_step_size: int = _ranged(2048, 1)
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = _ranged(5000, 0)


@dataclass
class Prompt:
    """What to answer. text: the user's words; the rest steers the chat template, as in mlx-lm.

    history: messages before them, each with "role" (user or assistant) and "content".
    """

    text: str
    system_prompt: str | None = None
    prefill_response: str | None = None
    ignore_chat_template: bool = False
    chat_template_config: str | None = None
    history: Sequence[Mapping[str, str]] = ()


@dataclass
class Options(_Ranged):
    """Length, stops and cache of one generation. max_tokens: -1 means no limit.

    num_draft_tokens: proposed at a time by the draft model, if there is one. on_token: called with the id of
    each token of the text as it comes. prompt_cache: mlx-lm's, of what comes before the tokens that are fed;
    it is filled further. None: an empty one.
    """

    max_tokens: int = 256
    stop: Sequence[str] | None = None
    extra_eos_token: Sequence[str] | None = None
    num_draft_tokens: int = _ranged(3, 1)
    cache: Cache = field(default_factory=Cache)
    on_token: Callable[[int], object] = lambda _: None
    prompt_cache: list[Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens == 0 or self.max_tokens < -1:
            raise UsageError(
                f"--max-tokens {self.max_tokens}: nothing to do",
                "give a positive number, or -1 for no limit",
            )


def picked(kind: type[_Kind], flags: Mapping[str, Any]) -> _Kind:
    """One of the classes above, made of the flags that have the names of its fields; others are left out."""
    return kind(**{name: flags[name] for name in kind.__annotations__ if name in flags})


def check(sampling: Sampling, cache: Cache, config: dict[str, Any]) -> None:
    """Refuse values that the model of this config.json can't take (UsageError, exit 2)."""
    vocabulary = config_json.size(config, "vocab_size")
    if vocabulary and sampling.top_k >= vocabulary:
        raise UsageError(f"--top-k {sampling.top_k}: the model has {vocabulary} tokens", "0 keeps them all")
    if vocabulary and sampling.min_tokens_to_keep > vocabulary:
        kept = f"--min-tokens-to-keep {sampling.min_tokens_to_keep}"
        raise UsageError(f"{kept}: the model has {vocabulary} tokens", "1 is the default")
    if cache.kv_bits is not None:
        _check_quantized(cache, config_json.sizes(config))


def _check_quantized(cache: Cache, sizes: dict[str, Any]) -> None:
    bits, group = cache.kv_bits, cache.kv_group_size
    if not layout.is_packable(bits, group):
        raise UsageError(
            f"--kv-bits {bits} --kv-group-size {group}: MLX has no such quantization",
            f"bits {layout.BITS}, groups {layout.GROUP_SIZES}",
        )
    width = sizes.get("head_dim") or sizes.get("hidden_size", 0) // (sizes.get("num_attention_heads") or 1)
    if width % group:
        raise UsageError(
            f"--kv-group-size {group} does not divide the model's heads of {width}", "leave --kv-bits out"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
