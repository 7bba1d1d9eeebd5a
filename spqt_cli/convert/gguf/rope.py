"""The rotary embedding's scaling in a .gguf file, as `rope_scaling` of an HF configuration.

A file either names a kind (`rope.scaling.type`) or carries a factor per frequency (`rope_freqs`).
"""

from typing import Any

import numpy as np

from spqt_cli.convert.gguf.file import ORIGINAL
from spqt_cli.convert.gguf.metadata import Metadata
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

# The llama3 kind's constants in every model that uses it; a file holds only the factors they lead to.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SAME = 1e-5  # relative: the factors are stored as float32 after a few float32 operations


def scaling(
    metadata: Metadata, theta: float, head_dim: int, context: int, factors: np.ndarray | None
) -> dict[str, Any] | None:
    """`rope_scaling`, or None for the plain rotation.

    theta: rope_theta. factors: float32 [head_dim / 2], what each frequency is divided by, or None.
    """
    named = _named_kind(metadata, context)
    if factors is None:
        return named
    if factors.shape != (head_dim // 2,) or not np.all(np.isfinite(factors) & (factors > 0)):
        raise SpqtError(f"{metadata.path}: rope_freqs.weight does not fit {head_dim // 2} frequencies", AGAIN)
    if np.all(factors == 1.0):
        return named
    if named is not None:
        raise UnsupportedError(
            f"{metadata.path} has rope_freqs.weight and rope.scaling.type at once", ORIGINAL
        )
    return _from_factors(factors, theta, head_dim, context)


def _named_kind(metadata: Metadata, context: int) -> dict[str, Any] | None:
    factor = metadata.real("rope.scaling.factor", 0.0) or metadata.real("rope.scale_linear", 0.0)
    # A factor without a kind is linear: the format's rule for older files.
    kind = metadata.text("rope.scaling.type", "linear" if factor else "none")
    original = metadata.size("rope.scaling.original_context_length", context)
    fast, slow = (metadata.real(f"rope.scaling.yarn_beta_{end}", 0.0) for end in ("fast", "slow"))
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{metadata.path} scales its rotary embedding by {kind!r}", ORIGINAL)
    if factor < 0:
        raise SpqtError(f"{metadata.path}: rope.scaling.factor is {factor}", AGAIN)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    found = {"type": "yarn", "rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = original
    return found | ({"beta_fast": fast} if fast else {}) | ({"beta_slow": slow} if slow else {})


def _from_factors(factors: np.ndarray, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    factor = round(float(factors.max()), 4)
    llama3 = {"type": "llama3", "rope_type": "llama3", "factor": factor, **LLAMA3}
    if np.allclose(llama3_factors(theta, head_dim, llama3), factors, rtol=SAME, atol=0):
        return llama3
    # Any other factors: longrope with both lists alike, and no stretch of its own (context = original).
    listed = [float(f) for f in factors]
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "original_max_position_embeddings": context,
    }


def llama3_factors(theta: float, head_dim: int, kind: dict[str, Any]) -> np.ndarray:
    """What the llama3 kind divides each frequency by: float64 [head_dim / 2]."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = kind["original_max_position_embeddings"] / wavelength
    low, high = kind["low_freq_factor"], kind["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / kind["factor"] + smooth)
