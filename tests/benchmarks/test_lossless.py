"""Chains of drafts, computed at once, are decode steps; and the arithmetic of what they would give."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.decode import phase, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.measure import probes

chains = pytest.importorskip("benchmarks.lossless_chains", reason="benchmarks/ is no part of an archive")
costs = pytest.importorskip("benchmarks.lossless_costs", reason="benchmarks/ is no part of an archive")

DRAFTS, SPLIT = 3, 12


def drafted(loaded: session.Loaded, tokens: list[int], start: int) -> list[mx.array]:
    """Logits of a chain from position `start` on: dense rows before it, then sparse steps."""
    cache = probes.empty_cache(loaded.model)
    loaded.model(mx.array([tokens[:start]]), cache=cache)
    with phase.decoding():
        steps = [loaded.model(mx.array([[token]]), cache=cache) for token in tokens[start : start + DRAFTS]]
    return [step[0, -1] for step in steps]


def test_chains_at_once_are_steps_after_dense_rows(calibrated: Path) -> None:
    tokens = np.random.default_rng(2).integers(5, 500, 24).tolist()
    loaded = session.load(calibrated)
    expected = {start: drafted(loaded, tokens, start) for start in (SPLIT, SPLIT + 1, SPLIT + 6)}
    dense = loaded.model(mx.array([tokens[:-1]]))[0, SPLIT:]
    layers = zigzag_layers(loaded.model)
    masking = probes.Masking({path: layer.threshold.item() for path, layer in layers.items()})
    with probes.probing(loaded.model) as harness:
        found = chains.logits(loaded.model, harness, masking, chains.Window(tokens, SPLIT), DRAFTS)
    # float32 in another order of summation; skipping itself moves logits a thousand times as much
    close = {"rtol": 1e-3, "atol": 1e-4}
    assert mx.allclose(found[0], dense, **close)
    for start, steps in expected.items():
        for place, step in enumerate(steps):
            at = start - SPLIT + place
            assert mx.allclose(found[1 + place, at], step, **close), (start, place)
            assert mx.abs(step - dense[at]).max() > 0.05
            # Where a chain would begin in the prompt it is a shorter one; farther on they all differ.
            others = [other for other in range(DRAFTS) if other != place and start > SPLIT + DRAFTS]
            assert all(mx.abs(found[1 + other, at] - step).max() > 1e-3 for other in others)


def test_rules_of_acceptance_by_hand() -> None:
    dense, sparse = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.7, 0.1])
    found = chains.accepted(mx.log(mx.array(np.stack([dense, sparse, dense])[:, None])))
    assert found["greedy"].tolist() == [[0], [1]]
    assert found["min"][:, 0] == pytest.approx([0.6, 1.0], abs=1e-6)
    assert found["equal"][:, 0] == pytest.approx([0.1 + 0.21 + 0.02, 0.25 + 0.09 + 0.04], abs=1e-6)


def test_a_chain_ends_at_its_first_wrong_draft() -> None:
    # First drafts at four positions, and second drafts at the position after each.
    chance = np.array([[1.0, 1.0, 0.0, 1.0], [0.0, 0.5, 0.0, 1.0]])
    assert chains.means(chance) == pytest.approx([2 / 3, 2 / 3 + 0.5 / 3])
    assert chains.means(np.ones((4, 9))) == pytest.approx([1, 2, 3, 4])


def test_speed_by_costs() -> None:
    one = costs.Costs("any", "", {0.5: 0.6}, {2: 1.2, 4: 1.6})
    assert one.token(0.25) == pytest.approx(0.8)
    assert one.token(0.75) == pytest.approx(0.4)
    assert one.step(3) == pytest.approx(1.4)
    assert one.speedup(0.5, [0.8]) == pytest.approx((1.8 / (0.6 + 1.2), 1))
    assert one.speedup(0.5, costs.perfect(3)) == pytest.approx((4 / (1.8 + 1.6), 3))
    assert one.speedup(0.5, [0.8], rows_free=True) == pytest.approx((1.8 / 1.6, 1))
    with pytest.raises(ValueError, match="8 rows"):
        one.step(8)


def test_stored_results_give_costs() -> None:
    by_name = {one.name: one for one in costs.stored()}
    assert len(by_name) == 6
    for one in by_name.values():
        assert 0.4 < one.token(0.5) < 1.2
        assert all(1.0 <= one.step(rows) <= one.step(rows + 1) < 3 for rows in range(1, 5))
