"""Computes thresholds from histograms of |x|, the curve stored per layer, and the threshold at a sparsity.

A histogram counts |x| by the upper bits of its float32 pattern (sign dropped): 32 bins an octave over
the whole range of float32, with exact edges and no logarithm; zero has bin 0. It knows no models.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from spqt_cli.errors import UsageError

# Sparsities at which a layer's curve gives the threshold: 0, 0.02, ..., 0.96, 0.98.
CURVE_SPARSITIES = tuple(i / 50 for i in range(50))
MAX_SPARSITY = CURVE_SPARSITIES[-1]
QUANTILES = (*(i / 25 for i in range(25)), 0.98)  # of |x| that a calibration records of each layer's inputs
MOST_TO_RUN = 0.95  # sparsity that a model can be calibrated for or run at
SHIFT = 18  # bits dropped: 5 of the mantissa's 23 remain, 32 bins an octave
BINS = 1 << (31 - SHIFT)
FINITE_BINS = 0xFF << (23 - SHIFT)  # bins from here on hold infinities and NaN
EDGES = (np.arange(FINITE_BINS + 1, dtype=np.uint32) << SHIFT).view(np.float32).astype(np.float64)
# Only zeros, and denormals, which some devices take for zeros, lie under this: it is just above the smallest
# normal float32, and short enough to survive rounding to six digits. What 16-bit types hold lies above.
LOSSLESS = 1.2e-38
NOTICEABLE = 0.05  # fraction of exact zeros from which skipping them is worth the comparisons
_DENORMAL_BINS = 1 << (23 - SHIFT)  # bins below here hold 0 and what is smaller than any normal float32


def histogram(x: mx.array) -> np.ndarray:
    """Counts of |x| per bin: (BINS,), int64; by numpy, since MLX's CPU scatter takes six times as long."""
    bits = np.array(x.astype(mx.float32), copy=False).reshape(-1).view(np.uint32)
    return np.bincount((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(SHIFT), minlength=BINS)


def quantile(counts: np.ndarray, fractions: np.ndarray | Sequence[float]) -> np.ndarray:
    """The thresholds below which the given fractions of a histogram's values lie: float64.

    counts: (FINITE_BINS,) or longer; fractions: each in 0 to 1. 0 gives 0; values of one bin count
    as evenly spread; a fraction that zeros alone make up gives LOSSLESS.
    """
    below = np.concatenate([[0], np.cumsum(counts[:FINITE_BINS], dtype=np.float64)])
    wanted = np.asarray(fractions, np.float64)
    place = np.interp(wanted * below[-1], *_strictly_rising(below))
    t = np.maximum(np.interp(place, np.arange(len(EDGES)), EDGES), LOSSLESS)
    return np.where(wanted <= 0, 0.0, t)


def _strictly_rising(below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the cumulative counts, flat stretches reduced to their upper end."""
    keep = np.append(np.diff(below) > 0, True)  # last place of each run of equal counts
    return below[keep], np.flatnonzero(keep).astype(np.float64)


def curve(counts: np.ndarray) -> list[float]:
    """The thresholds at CURVE_SPARSITIES, as stored in a layer's entry."""
    return quantile(counts, CURVE_SPARSITIES).tolist()


def is_dead(counts: np.ndarray) -> bool:
    """True where the inputs tell nothing apart: all zero, or all of one magnitude.

    A threshold there would skip all channels or none.
    """
    return bool(np.count_nonzero(counts) <= 1)


def zeros(counts: np.ndarray) -> float:
    """The fraction of a histogram's values that are exactly 0, or denormal."""
    return float(counts[:_DENORMAL_BINS].sum() / max(counts.sum(), 1))


def lossless(counts: np.ndarray) -> float:
    """The threshold that skips a layer's exact zeros and nothing else; 0.0 where there are hardly any."""
    return LOSSLESS if zeros(counts) >= NOTICEABLE else 0.0


def derive(stored: Sequence[float], sparsity: float) -> float:
    """The threshold at `sparsity` (0 to MAX_SPARSITY) from a layer's stored curve; 0.0 skips nothing.

    At 0 only exact zeros are skipped, in layers that have them.
    """
    if not 0 <= sparsity <= MAX_SPARSITY:
        raise UsageError(f"sparsity {sparsity} is not in 0 to {MAX_SPARSITY}", "0.25 skips a quarter")
    if not stored:
        return 0.0
    return float(np.interp(sparsity, CURVE_SPARSITIES, stored))


def check_sparsity(sparsity: float | None, asked: str = "") -> None:
    """Refuse (exit 2) a sparsity to calibrate for or to run at that is not in 0 to 0.95.

    asked: how it was given, where that is not as a sparsity; None stands for a default and passes.
    """
    if sparsity is not None and not 0 <= sparsity <= MOST_TO_RUN:
        raise UsageError(
            f"{asked or f'sparsity {sparsity}'} is not in 0 to {MOST_TO_RUN}", "0.25 skips a quarter"
        )


def default_sparsity(weights: int) -> float:
    """The sparsity to calibrate a model of that many weights for: small models lose more by skipping.

    Embedding and head count: sizes are those that models are named by. docs/quality.md has the evidence.
    """
    return 0.25 if weights < 0.5e9 else 0.3 if weights < 1.5e9 else 0.4
