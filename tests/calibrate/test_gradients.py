"""Costs of skipping: against the definition, and against the KL divergence they stand for."""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.calibrate import gradients
from spqt_cli.decode import session
from spqt_cli.format import thresholds
from spqt_cli.measure import probes, scoring


def test_dropped_against_the_definition():
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((7, 50)), rng.standard_normal((7, 50))
    steps = np.array([0.0, 0.3, 0.3, 1.1, 5.0])
    expected = np.stack([(x * g * (np.abs(x) < t)).sum(axis=1) for t in steps], axis=1)
    assert gradients.dropped(x, g, steps) == pytest.approx(expected)


def test_a_value_at_the_threshold_is_active():
    x, g = np.array([[1.0, 2.0]]), np.array([[1.0, 10.0]])
    assert gradients.dropped(x, g, np.array([0.0, 1.0, 2.0])).tolist() == [[0, 0, 1]]


def test_drawn_tokens_follow_the_predictions():
    p = np.tile([0.7, 0.2, 0.1], (20000, 1))
    gradient = gradients.less_drawn(p.copy(), np.random.default_rng(0))
    # binomial with 20,000 draws: standard deviation 0.0032
    assert (gradient < 0).mean(axis=0) == pytest.approx([0.7, 0.2, 0.1], abs=0.015)
    assert gradient.sum(axis=-1) == pytest.approx(0, abs=1e-9)


def test_cost_is_the_divergence(converted):
    """For a small change of one layer, the cost predicts the measured KL."""
    loaded = session.load(converted, dense=True)
    windows = np.random.default_rng(0).integers(5, 500, (8, 64)).astype(np.int32)
    path, place = "model.layers.0.mlp.down_proj", 8  # 20 % of one layer
    with probes.probing(loaded.model) as harness:
        with harness.counting() as counts:
            for row in windows:
                probes.prompt_cache(loaded.model, mx.array(row[None]))
        steps = {name: thresholds.quantile(c, gradients.SPARSITIES) for name, c in counts.items()}
        found = gradients.Sensitivity(steps, seed=0)
        masking, measured = probes.Masking({path: float(steps[path][place])}), []
        for row in windows:
            prompt, rest = mx.split(mx.array(row[None]), 2, axis=1)
            cache = probes.prompt_cache(loaded.model, prompt)
            found.add(loaded.model, harness, row, cache)
            dense = scoring.Reference(
                scoring.log_probabilities(probes.continuation(loaded.model, rest, cache))
            )
            with harness.masked(masking):
                masked = scoring.log_probabilities(probes.continuation(loaded.model, rest, cache))
            measured.append(scoring.divergence(dense, masked).mean())
    cost = found.costs[path][place] / found.positions
    # 256 positions, one draw each: the cost's own error is some 10 %; attention adds cross terms
    assert cost == pytest.approx(np.mean(measured), rel=0.5)
    assert np.mean(measured) > 1e-6
