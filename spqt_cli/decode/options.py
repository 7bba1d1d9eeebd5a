"""What one generation is asked for, and which values it takes: a wrong one is a line about its flag."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spqt_cli.decode import session
from spqt_cli.errors import UsageError
from spqt_cli.format import config_json, layout

LARGEST_SEED = (1 << 64) - 1  # MLX's
# Flag -> least and largest value; ends included.
RANGES: dict[str, tuple[float, float]] = {
    "temp": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, math.inf),
    "min_tokens_to_keep": (1, math.inf), "xtc_probability": (0, 1), "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0, 1e6), "seed": (0, LARGEST_SEED), "max_kv_size": (1, math.inf),
    "prefill_step_size": (1, math.inf), "quantized_kv_start": (0, math.inf),
    "num_draft_tokens": (1, math.inf),
}  # fmt: skip


@dataclass
class Sampling:
    """How the next token is drawn; names and meanings are mlx-lm's. temp 0 takes the likeliest."""

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None


@dataclass
class Prompt:
    """What to answer. text: the user's words; the rest steers the chat template, as in mlx-lm."""

    text: str
    system: str | None = None
    prefill: str | None = None
    ignore_chat_template: bool = False
    template_config: str | None = None


@dataclass
class Options:
    """Length, stops, cache and draft model of one generation; cache settings are mlx-lm's.

    on_token: told each token of the text as it comes.
    """

    max_tokens: int = 256
    stop: Sequence[str] = ()
    extra_eos_tokens: Sequence[str] = ()
    cache: dict[str, Any] = field(default_factory=dict)
    draft: session.Draft | None = None
    on_token: Callable[[int], object] = lambda _: None


def check(sampling: Sampling, options: Options, config: dict[str, Any]) -> None:
    """Refuse values outside their range, or that this model can't take (exit 2)."""
    if options.max_tokens == 0 or options.max_tokens < -1:
        raise UsageError(f"--max-tokens {options.max_tokens}: nothing to do", "-1 means no limit")
    given = {**vars(sampling), **options.cache}
    for name, (least, largest) in RANGES.items():
        value = given.get(name)
        if value is not None and not least <= value <= largest:  # NaN compares false
            wanted = f"at least {least:g}" if largest == math.inf else f"{least:g} to {largest:g}"
            raise UsageError(f"{_flag(name)} {value} is out of range", f"{wanted} is possible")
    vocabulary = config_json.size(config, "vocab_size")
    if vocabulary and sampling.top_k >= vocabulary:
        raise UsageError(f"--top-k {sampling.top_k}: the model has {vocabulary} tokens", "0 keeps them all")
    if vocabulary and sampling.min_tokens_to_keep > vocabulary:
        kept = f"--min-tokens-to-keep {sampling.min_tokens_to_keep}"
        raise UsageError(f"{kept}: the model has {vocabulary} tokens", "1 is the default")
    if options.cache.get("kv_bits") is not None:
        _check_quantized_cache(options.cache, config_json.sizes(config))


def _check_quantized_cache(cache: dict[str, Any], sizes: dict[str, Any]) -> None:
    bits, group = cache["kv_bits"], cache.get("kv_group_size", 64)
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
