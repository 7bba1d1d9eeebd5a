"""Allocation against brute force, and on costs made to trap it."""

import itertools

import numpy as np
import pytest

from spqt_cli.calibrate import allocation
from spqt_cli.format.thresholds import CURVE_SPARSITIES

SPARSITIES = np.array([0.0, 0.25, 0.5, 0.75])


def skipped(levels: dict[str, np.ndarray], weights: dict[str, int], at: int) -> float:
    return sum(weights[path] * levels[path][at] for path in weights) / sum(weights.values())


def test_every_total_is_met_and_levels_rise():
    rng = np.random.default_rng(0)
    weights = {"a": 10, "b": 30, "c": 60}
    costs = {path: np.append(0, rng.random(3).cumsum()) for path in weights}
    levels = allocation.cheapest(costs, weights, SPARSITIES)
    for at, total in enumerate(CURVE_SPARSITIES):
        assert skipped(levels, weights, at) == pytest.approx(total, abs=1e-9)
    assert all((np.diff(rising) >= -1e-12).all() for rising in levels.values())


def test_cost_is_that_of_the_best_choice():
    rng = np.random.default_rng(1)
    weights = dict.fromkeys("abcd", 1)
    # convex costs: stepping along the cheapest is then the optimum, found here by trying everything
    costs = {path: np.append(0, np.sort(rng.random(3)).cumsum()) for path in weights}
    levels = allocation.cheapest(costs, weights, SPARSITIES)
    at = CURVE_SPARSITIES.index(0.5)  # 8 of 16 steps
    mine = sum(np.interp(levels[path][at], SPARSITIES, costs[path]) for path in weights)
    best = min(
        sum(costs[path][step] for path, step in zip("abcd", choice, strict=True))
        for choice in itertools.product(range(4), repeat=4)
        if sum(choice) == 8
    )
    assert mine == pytest.approx(best, rel=1e-9)


def test_small_costly_layer_is_left_dense():
    weights = {"v": 1, "down": 99}
    costs = {"v": np.array([0, 9.0, 20, 40]), "down": np.array([0, 0.1, 0.3, 0.9])}
    levels = allocation.cheapest(costs, weights, SPARSITIES)
    at = CURVE_SPARSITIES.index(0.5)
    assert levels["v"][at] == 0
    assert levels["down"][at] == pytest.approx(0.5 * 100 / 99)


def test_cost_that_falls_counts_as_flat():
    weights = {"a": 1, "b": 1}
    costs = {"a": np.array([0, -2.0, -3.0, 3.0]), "b": np.array([0, 2.0, 1.0, 3.0])}
    levels = allocation.cheapest(costs, weights, SPARSITIES)
    for at, total in enumerate(CURVE_SPARSITIES):
        assert skipped(levels, weights, at) == pytest.approx(total, abs=1e-9)


def test_lower_hull():
    assert allocation.lower_hull(np.arange(5.0), np.array([0, 3, 1, 4, 4.0])) == [0, 2, 4]
    assert allocation.lower_hull(np.arange(3.0), np.array([0, 1, 2.0])) == [0, 2]
