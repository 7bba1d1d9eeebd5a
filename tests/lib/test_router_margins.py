"""A router's tie is told by its scores."""

import math

import mlx.core as mx
import numpy as np
import pytest

from tests.lib.router_margins import margin, margins

SCORES = np.array([[0.5, -4.0, 1.0, 0.75]])


@pytest.mark.parametrize(
    ("scores", "kth", "expected"),
    [
        (SCORES, -2, 0.25 / 4),  # 1.0 and 0.75 are chosen, 0.5 is next
        (-SCORES, 1, 0.25 / 4),
        (SCORES, -1, 0.25 / 4),
        (SCORES, -3, 4.5 / 4),
        (SCORES, -4, math.inf),  # all are chosen
        (SCORES[:, :1], -1, math.inf),
        (np.array([[-np.inf, 1.0, -np.inf]]), -2, math.inf),  # what is forbidden does not tie
        (np.array([[0.0, 1.0, 0.0]]), -2, math.inf),  # nor what is exactly 0 behind a ReLU
        (np.array([[2.0, 1.0], [3.0, 3.0]]), -1, 0.0),  # the smallest of all rows
    ],
)
def test_margin_by_hand(scores, kth, expected):
    assert margin(scores, kth) == pytest.approx(expected)


def test_running_routers_are_watched_compiled_ones_too():
    @mx.compile
    def choose(scores):
        return mx.argpartition(-scores, kth=0, axis=-1)[..., :1]

    scores = mx.array([[1.0, 4.0, 3.0]])
    assert choose(scores).item() == 1
    with margins() as found:
        assert choose(scores).item() == 1
    assert found.routers == pytest.approx(0.25)
    choose(mx.array([[1.0, 1.0, 1.0]]))
    assert found.routers == pytest.approx(0.25)  # the block has ended


def test_values_near_a_half_are_seen():
    """As in afm7, which rounds its keys and values."""
    with margins() as found:
        assert mx.array([0.9, -2.4, 8.0]).round().tolist() == [1.0, -2.0, 8.0]
    assert found.steps == pytest.approx(0.1 / 8, rel=1e-5)
    assert mx.array([0.5 + 1e-6]).round().item() == 1.0
    assert found.steps == pytest.approx(0.1 / 8, rel=1e-5)
