"""Which values a generation takes, so that a wrong one is a line about its flag, not an error of mlx-lm's.

It knows ranges alone; what the values mean is `generate`'s.
"""

import math
from typing import TYPE_CHECKING, Any

from spqt_cli.errors import UsageError
from spqt_cli.format import config_json, layout

if TYPE_CHECKING:
    from spqt_cli.decode.generate import Options, Sampling

LARGEST_SEED = (1 << 64) - 1  # MLX's
# Flag -> least and largest value; ends included.
RANGES: dict[str, tuple[float, float]] = {
    "temp": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, math.inf),
    "min_tokens_to_keep": (1, math.inf), "xtc_probability": (0, 1), "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0, 1e6), "seed": (0, LARGEST_SEED), "max_kv_size": (1, math.inf),
    "prefill_step_size": (1, math.inf), "quantized_kv_start": (0, math.inf),
    "num_draft_tokens": (1, math.inf),
}  # fmt: skip


def check(sampling: "Sampling", options: "Options", config: dict[str, Any]) -> None:
    """Refuse values outside their range, or that this model can't take (exit 2)."""
    if options.max_tokens == 0 or options.max_tokens < -1:
        raise UsageError(f"--max-tokens {options.max_tokens}: nothing to do", "-1 means no limit")
    given = {**vars(sampling), **options.cache}
    for name, (least, largest) in RANGES.items():
        value = given.get(name)
        if value is not None and not least <= value <= largest:  # NaN compares false
            wanted = f"at least {least:g}" if largest == math.inf else f"{least:g} to {largest:g}"
            raise UsageError(f"{_flag(name)} {value} is out of range", f"{wanted} is possible")
    vocabulary = config_json.whole(config, "vocab_size")
    if vocabulary and sampling.top_k >= vocabulary:
        raise UsageError(f"--top-k {sampling.top_k}: the model has {vocabulary} tokens", "0 keeps them all")
    if vocabulary and sampling.min_tokens_to_keep > vocabulary:
        kept = f"--min-tokens-to-keep {sampling.min_tokens_to_keep}"
        raise UsageError(f"{kept}: the model has {vocabulary} tokens", "1 is the default")
    if options.cache.get("kv_bits") is not None:
        _check_quantized_cache(options.cache, config_json.sizes(config))


def _check_quantized_cache(cache: dict[str, Any], sizes: dict[str, Any]) -> None:
    bits, group = cache["kv_bits"], cache.get("kv_group_size", 64)
    if bits not in layout.BITS or group not in layout.GROUP_SIZES:
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
