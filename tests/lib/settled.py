"""Thresholds on which nothing hangs on rounding: no input of a greedy run lies within rounding of one.

Sums of several processes are rounded in another order than sums of one. Where an input lies on a threshold,
the last bit decides whether the channel is skipped, and a run goes another way from there on. So thresholds
that are too close to any input are moved by a thousandth, until none is.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.decode import layers, phase, session
from spqt_cli.decode.session import Loaded

# Least distances of an input from its threshold, relative to it: what is enough at once, and what the best of
# some rounds must have. float32 sums through some layers differ by a few roundings of 6e-8.
ENOUGH, LEAST, ROUNDS = 1e-4, 5e-6, 40
FILE = "settled.json"  # path -> threshold, in a converted folder


def settle(folder: Path, run: Any) -> dict[str, float]:
    """Path -> threshold. run(loaded): the greedy run that is to be decided by more than rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPQT_BACKEND", "stock")  # nothing is fused: every layer sees its input
        loaded = session.load(folder)
        found = {
            path: layer.threshold.item()
            for path, layer in layers.zigzag_layers(loaded.model).items()
            if layer.threshold is not None
        }
        gaps = _watched(patch)
        best: tuple[float, dict[str, float]] = (0.0, {})
        for _ in range(ROUNDS):
            put(loaded, found)
            gaps.clear()
            run(loaded)
            best = max(best, (min(gaps.values()), found), key=lambda one: one[0])
            if best[0] >= ENOUGH:
                break
            listed = layers.zigzag_layers(loaded.model).items()
            close = {path for path, layer in listed if gaps.get(id(layer), 1.0) < ENOUGH}
            found = {path: value * (1.001 if path in close else 1.0) for path, value in found.items()}
    assert best[0] >= LEAST, "rounding decides"
    return best[1]


def put(loaded: Loaded, thresholds: dict[str, float]) -> None:
    """Let a model skip by these, and nothing elsewhere."""
    for path, layer in layers.zigzag_layers(loaded.model).items():
        layer.set_threshold(thresholds.get(path))


def _watched(patch: pytest.MonkeyPatch) -> dict[int, float]:
    """Layer's id -> the least distance of its inputs from its threshold in decode steps, relative to it."""
    from spqt_cli.decode import experts  # which imports mlx-lm, that must know our hooks by then

    gaps: dict[int, float] = {}

    def watch(layer: Any, x: mx.array) -> None:
        if layer.threshold is not None and phase.decodes():
            threshold = layer.threshold.item()
            distance = np.abs(np.abs(np.array(x, np.float64)) - threshold).min() / threshold
            gaps[id(layer)] = min(gaps.get(id(layer), 1.0), float(distance))

    for kind, name in ((layers.ZigzagLinear, "_product"), (experts.ZigzagSwitchLinear, "_products")):
        own = getattr(kind, name)

        def watched(self: Any, x: mx.array, *more: Any, own: Any = own) -> mx.array:
            watch(self, x)
            return own(self, x, *more)

        patch.setattr(kind, name, watched)
    return gaps
