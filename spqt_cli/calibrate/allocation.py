"""Which layer skips how much: a sparsity per layer for every total, from what each costs in each layer.

Costs are summed as if layers did not interact, so the best sparsities for a total are found exactly by
raising, step by step, the layer that costs least per weight skipped. It knows no models.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from spqt_cli.format.thresholds import CURVE_SPARSITIES


def cheapest(
    costs: Mapping[str, np.ndarray], sizes: Mapping[str, int], sparsities: np.ndarray
) -> dict[str, np.ndarray]:
    """Path -> the layer's sparsity at each total of CURVE_SPARSITIES: (50,), rising.

    costs: path -> cost of each of `sparsities` (rising, the first 0). sizes: path -> weights in the layer.
    Totals that these can't reach are met by raising all layers alike towards 1.
    """
    segments = []
    for path, measured in costs.items():
        cost = np.maximum.accumulate(measured)  # a cost that falls is noise
        corners = lower_hull(sparsities, cost)
        for a, b in pairwise(corners):
            gained = (sparsities[b] - sparsities[a]) * sizes[path]
            segments.append(((cost[b] - cost[a]) / gained, gained, path, sparsities[b]))
    segments.sort(key=lambda segment: segment[0])
    total = sum(sizes[path] for path in costs)
    skipped, reached = 0.0, dict.fromkeys(costs, 0.0)
    totals, states = [0.0], [dict(reached)]
    for _, gained, path, sparsity in segments:
        skipped += gained
        reached[path] = sparsity
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
