"""What rotary positions a config asks for, and what a built model turns with: one form for both.

A `Turning` is the angle per position of each pair of a head, and the factor on queries and keys. The kinds
are those of transformers (`modeling_rope_utils`), where their papers are named; it knows no architecture.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

EXACT = 1e-5  # relative: mlx-lm computes its frequencies in float32


@dataclass(frozen=True)
class Turning:
    """How one layer turns queries and keys.

    angles: radians per position of each pair, (dims / 2,) float64. scale: on both, 1 where nothing is scaled.
    limit: tokens up to which it holds; None where it holds at every length.
    """

    angles: np.ndarray
    scale: float = 1.0
    limit: int | None = None

    def equals(self, other: "Turning") -> bool:
        """Whether both turn alike, to float32; a pair that is never turned may be left out."""
        count = max(len(self.angles), len(other.angles))
        mine, theirs = (np.pad(one.angles, (0, count - len(one.angles))) for one in (self, other))
        return bool(np.allclose(mine, theirs, rtol=EXACT, atol=0) and abs(self.scale - other.scale) < EXACT)


def wanted(rope: dict[str, Any], head_dim: int, longest: int | None) -> Turning:
    """The turning that `rope_parameters` of transformers' form define.

    rope: with rope_type and rope_theta. longest: the model's max_position_embeddings.
    Raises LookupError, TypeError or ValueError where something is missing or no number, and ValueError for
    a kind that isn't known.
    """
    kind, base = rope.get("rope_type") or "default", float(rope["rope_theta"])
    share = rope.get("partial_rotary_factor")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor {share!r}")
    dims = int(head_dim * (1.0 if share is None else share))
    if kind == "proportional":
        turned = int((1.0 if share is None else share) * head_dim // 2)
        angles = base ** (-np.arange(turned) * 2 / head_dim) / rope.get("factor", 1.0)
        return Turning(np.pad(angles, (0, head_dim // 2 - turned)))
    plain = base ** (-np.arange(0, dims, 2) / dims)
    if kind in ("default", "mrope"):  # the sections of mrope are one and the same for text
        return Turning(plain)
    if kind == "linear":
        return Turning(plain / float(rope["factor"]))
    if kind == "dynamic" and "alpha" in rope:
        return Turning((base * rope["alpha"] ** (dims / (dims - 2))) ** (-np.arange(0, dims, 2) / dims))
    if kind == "dynamic":  # another base beyond the trained length
        return Turning(plain, limit=longest)
    if kind == "llama3":
        return Turning(_llama3(plain, rope))
    if kind == "yarn":
        return Turning(_yarn(plain, rope, base, dims), _yarn_scale(rope, longest))
    if kind in ("longrope", "su"):
        return _longrope(plain, rope, longest)
    raise ValueError(f"rope_type {kind!r}")


def _llama3(plain: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """Long waves slowed by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    share = np.clip((context * plain / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return plain * (share + (1 - share) / factor)


def _yarn(plain: np.ndarray, rope: dict[str, Any], base: float, dims: int) -> np.ndarray:
    """YaRN's ramp between kept and slowed pairs (arXiv 2309.00071)."""
    context = float(rope["original_max_position_embeddings"])

    def pair(rotations: float) -> float:
        return dims * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain * (1 - ramp) + plain / float(rope["factor"]) * ramp


def _yarn_scale(rope: dict[str, Any], longest: int | None) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = (
        rope["factor"] if rope["factor"] is not None else longest / rope["original_max_position_embeddings"]
    )

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _longrope(plain: np.ndarray, rope: dict[str, Any], longest: int | None) -> Turning:
    """The short factors, which hold up to the original length (arXiv 2402.13753)."""
    context = rope["original_max_position_embeddings"]
    short, long = (np.array(rope[name], np.float64) for name in ("short_factor", "long_factor"))
    factor = rope.get("factor")
    factor = longest / context if factor is None else factor
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    given = rope.get("short_mscale") or rope.get("attention_factor")
    same = np.array_equal(short, long) and rope.get("short_mscale") == rope.get("long_mscale")
    return Turning(plain / short, float(given or scale), None if same else int(context))


def built(model: nn.Module) -> Iterator[tuple[str, Turning, bool]]:
    """(path, turning, whether neighbours are paired) of each rotary module whose form is known."""
    for path, module in model.named_modules():
        turning = of_module(module)
        if turning is not None:
            yield path, turning, bool(getattr(module, "traditional", False))


def of_module(module: nn.Module) -> Turning | None:
    """The turning of a rotary module of MLX's or mlx-lm's; None for other modules."""
    from mlx_lm.models import rope_utils

    if type(module) is nn.RoPE:
        return Turning(module.scale * module.base ** (-np.arange(0, module.dims, 2) / module.dims))
    if type(module) is rope_utils.DynamicNTKScalingRoPE:
        angles = module.base ** (-np.arange(0, module.dims, 2) / module.dims)
        return Turning(angles, limit=module.max_position_embeddings)
    if "rope" not in type(module).__name__.lower() and "rotary" not in type(module).__name__.lower():
        return None
    freqs = getattr(module, "_freqs", None)
    if not isinstance(freqs, mx.array) or freqs.ndim != 1:
        return None
    scale = getattr(module, "mscale", None) or getattr(module, "_scale", None) or 1.0
    with np.errstate(divide="ignore"):
        return Turning(1.0 / np.array(freqs.astype(mx.float32)).astype(np.float64), float(scale))
