"""The stored curve: through the refined thresholds, rising, and the dense pass's where nothing moved."""

import numpy as np
import pytest

from spqt_cli.calibrate.curves import curve, curves, second_sparsity
from spqt_cli.calibrate.measurements import Candidate
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES

TOTALS = np.array(CURVE_SPARSITIES)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    bits = np.abs(np.random.default_rng(0).standard_normal(20_000)).astype(np.float32).view(np.uint32)
    return np.bincount(bits >> np.uint32(thresholds.SHIFT), minlength=thresholds.BINS)


@pytest.fixture(scope="module")
def dense(counts) -> np.ndarray:
    return np.array(thresholds.quantile(counts, TOTALS))


def candidate(chosen: float) -> Candidate:
    return Candidate("uniform", {"one": TOTALS}, {"one": chosen})


@pytest.mark.parametrize(("target", "other"), [(0.24, 0.5), (0.6, 0.3)])
def test_curve_passes_through_both_refined_thresholds(counts, dense, target: float, other: float) -> None:
    at = dict(zip(CURVE_SPARSITIES, dense, strict=True))
    one = candidate(0.95 * at[target])
    one.second = (other, {"one": 0.9 * at[other]})
    found = curve(one, "one", counts, target)
    assert np.interp(target, TOTALS, found) == pytest.approx(0.95 * at[target], rel=1e-9)
    assert np.interp(other, TOTALS, found) == pytest.approx(0.9 * at[other], rel=1e-9)
    assert found[0] == 0
    assert (np.diff(found) >= 0).all()


def test_curve_without_a_second_sparsity_and_without_any(counts, dense) -> None:
    found = curve(candidate(0.9 * dense[20]), "one", counts, 0.4)
    assert found[10] == pytest.approx(0.95 * dense[10])  # half the sparsity, half the change
    assert found[40] == pytest.approx(0.8 * dense[40])  # twice the sparsity, twice the change
    assert found[49] == pytest.approx(0.8 * dense[49])  # and no more than that
    assert curve(candidate(float(dense[20])), "one", counts, 0.4) == pytest.approx(dense.tolist())


def test_layer_left_dense_at_a_refined_sparsity(counts) -> None:
    one = candidate(0.0)
    one.sparsities = {"one": np.where(TOTALS < 0.45, 0.0, TOTALS)}
    one.second = (0.5, {"one": 0.5})
    found = curve(one, "one", counts, 0.4)
    assert found[20] == 0
    assert found[25] == pytest.approx(0.5)


def test_layers_without_a_threshold_have_no_curve(counts) -> None:
    assert curves(candidate(0.5), {"one": counts, "dead": counts}, 0.4).keys() == {"one"}


def test_second_sparsity_is_another_one() -> None:
    assert second_sparsity(0.0) is None
    for target in (0.1, 0.25, 0.4, 0.45, 0.5, 0.95):
        other = second_sparsity(target)
        assert other is not None
        assert abs(other - target) > 0.09
