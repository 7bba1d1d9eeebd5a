"""Who skips how much: levels per layer for every total, from the price of each layer's levels.

Prices are summed as if layers did not interact, so the best levels for a total are found exactly by
raising, step by step, the layer that pays least per weight skipped. It knows no models.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from spqt_cli.format.thresholds import CURVE_SPARSITIES


def cheapest_levels(
    costs: Mapping[str, np.ndarray], weights: Mapping[str, int], levels: np.ndarray
) -> dict[str, np.ndarray]:
    """Path -> the layer's sparsity at each total of CURVE_SPARSITIES: (50,), rising.

    costs: path -> price at each of `levels` (rising sparsities, the first 0). Totals that the levels
    can't reach are met by raising all layers alike towards 1.
    """
    segments = []
    for path, price in costs.items():
        cost = np.maximum.accumulate(price)  # a price that falls is noise
        corners = lower_hull(levels, cost)
        for a, b in pairwise(corners):
            gained = (levels[b] - levels[a]) * weights[path]
            segments.append(((cost[b] - cost[a]) / gained, gained, path, levels[b]))
    segments.sort(key=lambda segment: segment[0])
    total = sum(weights[path] for path in costs)
    skipped, reached = 0.0, dict.fromkeys(costs, 0.0)
    totals, states = [0.0], [dict(reached)]
    for _, gained, path, level in segments:
        skipped += gained
        reached[path] = level
        totals.append(skipped / total)
        states.append(dict(reached))
    totals.append(1.0)
    states.append(dict.fromkeys(costs, 1.0))
    return {path: np.interp(CURVE_SPARSITIES, totals, [state[path] for state in states]) for path in costs}


def lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """The corners of the lower convex hull of points with rising x, from the first to the last."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
