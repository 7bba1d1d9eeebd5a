"""Quantiles from histograms against sorting, and the stored curve."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.errors import UsageError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES


def counts_of(values: np.ndarray) -> np.ndarray:
    return thresholds.histogram(mx.array(values, mx.float32))


def heavy_tailed(n: int = 20000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp(rng.standard_normal(n))).astype(np.float32)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 0.98])
def test_quantile_skips_the_share(share):
    values = heavy_tailed()
    threshold = thresholds.quantile(counts_of(values), [share])[0]
    # A bin is at most 1/32 octave wide and holds under 1 % of these values; inside it they are
    # spread evenly up to noise: 0.2 % of all values covers it.
    assert abs((np.abs(values) < threshold).mean() - share) < 0.002


def test_zeros_are_skipped_first():
    values = np.concatenate([np.zeros(600, np.float32), np.ones(400, np.float32) * 3])
    threshold = thresholds.quantile(counts_of(values), [0.3])[0]
    assert 0 < threshold < 3


def test_share_zero_skips_nothing_even_zeros():
    assert thresholds.quantile(counts_of(np.zeros(10, np.float32)), [0.0])[0] == 0


def test_gap_between_values():
    values = np.array([1.0] * 50 + [100.0] * 50, np.float32)
    threshold = thresholds.quantile(counts_of(values), [0.5])[0]
    assert 1 < threshold <= 100


def test_signs_huge_and_tiny_values_have_bins():
    values = np.array([-1e-30, 1e-30, -3e38, 3e38, 2.0], np.float32)
    counts = counts_of(values)
    assert counts.sum() == 5
    assert counts[thresholds.FINITE_BINS :].sum() == 0
    assert sorted(counts[counts > 0]) == [1, 2, 2]


def test_infinities_and_nan_are_told_apart():
    counts = counts_of(np.array([np.inf, -np.inf, np.nan, 1.0], np.float32))
    assert counts[thresholds.FINITE_BINS :].sum() == 3


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_inputs_are_dead(value):
    assert thresholds.is_dead(counts_of(np.full(100, value, np.float32)))
    assert not thresholds.is_dead(counts_of(np.array([value, value + 1], np.float32)))


def test_curve_rises_and_derive_meets_its_points():
    curve = thresholds.curve(counts_of(heavy_tailed()))
    assert len(curve) == len(CURVE_SPARSITIES)
    assert all(a <= b for a, b in pairwise(curve))
    assert thresholds.derive(curve, CURVE_SPARSITIES[20]) == pytest.approx(curve[20])


def test_derive_between_points_reaches_the_share():
    values = heavy_tailed()
    threshold = thresholds.derive(thresholds.curve(counts_of(values)), 0.33)
    assert abs((np.abs(values) < threshold).mean() - 0.33) < 0.003  # as above, plus a straight line over 2 %


def test_derive_zero_is_dense_and_range_is_checked():
    curve = thresholds.curve(counts_of(heavy_tailed()))
    assert thresholds.derive(curve, 0) == 0.0
    for sparsity in (-0.1, 0.99):
        with pytest.raises(UsageError):
            thresholds.derive(curve, sparsity)


@pytest.mark.parametrize("sparsity", [-0.01, 0.96, float("nan"), float("inf")])
def test_sparsity_that_no_command_takes(sparsity):
    with pytest.raises(UsageError, match=r"sparsity .* is not in 0 to 0\.95"):
        thresholds.check_sparsity(sparsity)
    with pytest.raises(UsageError, match=r"--profile x is not in"):
        thresholds.check_sparsity(sparsity, "--profile x")


@pytest.mark.parametrize("sparsity", [None, 0, 0.0, 0.95])
def test_sparsity_at_the_ends_of_its_range(sparsity):
    thresholds.check_sparsity(sparsity)
