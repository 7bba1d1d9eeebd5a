"""A layer's stored curve: its thresholds at every sparsity, from those that were measured at one or two."""

from collections.abc import Mapping

import numpy as np

from spqt_cli.calibrate.measurements import Candidate
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES


def second_sparsity(target: float) -> float | None:
    """Where thresholds are refined besides the target; None for a target of 0.

    What refining changes is no straight line over the sparsity, so curves hold better through two points.
    """
    if not target:
        return None
    return 0.5 if target <= 0.4 else target / 2


def curves(candidate: Candidate, counts: Mapping[str, np.ndarray], target: float) -> dict[str, list[float]]:
    """Path -> the layer's thresholds at CURVE_SPARSITIES, for layers that have one at the target."""
    return {path: curve(candidate, path, counts[path], target) for path in candidate.thresholds}


def curve(candidate: Candidate, path: str, counts: np.ndarray, target: float) -> list[float]:
    """One layer's thresholds at CURVE_SPARSITIES, rising, passing through the refined one at the target.

    A layer with exact zeros skips them at every sparsity, 0 included. Elsewhere the dense pass's thresholds
    are scaled by as much as refining changed those at the refined sparsities, in proportion
    between them and up to twice the highest.

    counts: the layer's histogram of a dense pass.
    """
    lossless = thresholds.lossless(counts)
    dense = np.maximum(thresholds.quantile(counts, candidate.sparsities[path]), lossless)
    totals = np.array(CURVE_SPARSITIES)
    chosen = candidate.thresholds[path]
    refined = {target: chosen}
    if candidate.second is not None:
        second, found = candidate.second
        refined[second] = found[path]
    change = {0.0: 0.0}  # total sparsity -> what refining changed there, relative to the dense pass
    for total, value in sorted(refined.items()):
        if before := np.interp(total, totals, dense):
            change[total] = value / before - 1
    last = max(change)
    if not last:
        return dense.tolist()
    change[2 * last] = 2 * change[last]
    scaled = dense * np.maximum(1 + np.interp(totals, list(change), list(change.values())), 0)
    bounded = np.where(totals <= target, np.minimum(scaled, chosen), np.maximum(scaled, chosen))
    return np.maximum.accumulate(np.maximum(bounded, lossless)).tolist()
