"""The stored curve: through the settled shares, rising, and as the dense pass has it where nothing moved."""

from types import SimpleNamespace

import numpy as np
import pytest

from spqt_cli.calibrate import methods
from spqt_cli.calibrate.methods import Candidate, Search
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES

SHARES = np.array(CURVE_SPARSITIES)


def counts() -> np.ndarray:
    bits = np.abs(np.random.default_rng(0).standard_normal(20_000)).astype(np.float32).view(np.uint32)
    return np.bincount(bits >> np.uint32(thresholds.SHIFT), minlength=thresholds.BINS)


def search(target: float) -> tuple[Search, Candidate, np.ndarray]:
    found = {"one": counts()}
    candidate = Candidate("uniform", {"one": SHARES})
    dense = np.array(thresholds.quantile(found["one"], SHARES))
    return Search(SimpleNamespace(settled=None), found, target), candidate, dense


@pytest.mark.parametrize(("target", "other"), [(0.24, 0.5), (0.6, 0.3)])
def test_curve_passes_through_both_settled_shares(target: float, other: float) -> None:
    run, candidate, dense = search(target)
    at = dict(zip(CURVE_SPARSITIES, dense, strict=True))
    candidate.chosen = {"one": 0.95 * at[target]}
    candidate.second = (other, {"one": 0.9 * at[other]})
    curve = run.curve(candidate, "one")
    assert np.interp(target, SHARES, curve) == pytest.approx(0.95 * at[target], rel=1e-9)
    assert np.interp(other, SHARES, curve) == pytest.approx(0.9 * at[other], rel=1e-9)
    assert curve[0] == 0
    assert (np.diff(curve) >= 0).all()


def test_curve_without_a_second_share_and_without_any() -> None:
    run, candidate, dense = search(0.4)
    candidate.chosen = {"one": 0.9 * dense[20]}
    curve = run.curve(candidate, "one")
    assert curve[10] == pytest.approx(0.95 * dense[10])  # half the share, half the change
    assert curve[40] == pytest.approx(0.8 * dense[40])  # twice the share, twice the change
    assert curve[49] == pytest.approx(0.8 * dense[49])  # and no more than that
    candidate.chosen = {"one": float(dense[20])}
    assert run.curve(candidate, "one") == pytest.approx(dense.tolist())


def test_layer_left_dense_at_a_settled_share() -> None:
    run, candidate, _ = search(0.4)
    candidate.levels = {"one": np.where(SHARES < 0.45, 0.0, SHARES)}
    candidate.chosen = {"one": 0.0}
    candidate.second = (0.5, {"one": 0.5})
    curve = run.curve(candidate, "one")
    assert curve[20] == 0
    assert curve[25] == pytest.approx(0.5)


def test_second_share_is_another_one() -> None:
    assert methods.second_share(0.0) is None
    for target in (0.1, 0.25, 0.4, 0.45, 0.5, 0.95):
        other = methods.second_share(target)
        assert other is not None
        assert abs(other - target) > 0.09


def test_curves_settle_a_second_share_only_where_they_can() -> None:
    run, candidate, dense = search(0.24)
    asked = []

    def settled(counts, levels, on_step, rounds, windows):
        asked.append((levels["one"], rounds, windows))
        return {"one": float(dense[20])}

    run.bench = SimpleNamespace(settled=settled)
    candidate.chosen = {"one": float(dense[12])}
    assert run.curves(candidate, "auto", None)["one"] == pytest.approx(dense.tolist())
    assert asked == []
    assert run.curves(candidate, "auto", str)["one"][25] == pytest.approx(dense[20])
    assert run.curves(candidate, "fast", str)["one"][25] == pytest.approx(dense[20])
    assert asked == [(0.5, 1, 4), (0.5, 1, 2)]
