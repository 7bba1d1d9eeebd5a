"""What skipping costs, layer by layer, from gradients through the quantized model.

For small changes d of a layer's input the KL divergence of the model's predictions is half the
expectation of (d . g)^2, g being the gradient of -log p(y) with y drawn from the predictions
themselves (the Fisher information). d is what a level's threshold would set to zero, so one backward
pass prices every level of every layer. No training, no labels, and the text's own next tokens are
not used. It measures; who gets which level is allocation.py's business.

Source: the second-order expansion of KL, as in natural gradients (Amari 1998); our measurements of
gradient allocation are in docs/quality.md.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli import blas, observe, scoring

# Sparsities of one layer that are priced; above the last no allocation was ever better.
LEVELS = tuple(i / 40 for i in range(37))  # 0, 0.025, ..., 0.9


class Sensitivity:
    """Prices of every layer's LEVELS, summed over windows: path -> (levels,), in nats times positions.

    From a dense model a level's price is the KL divergence that it alone would cause. From a sparse
    one (`masking`, `current`) it is the change of the divergence from dense if this layer went to that
    level while the others stay: the slope there, which holds all interactions, plus the curvature.
    """

    def __init__(self, steps: Mapping[str, np.ndarray], seed: int) -> None:
        """steps: path -> the layer's thresholds at LEVELS, rising."""
        self.steps = steps
        self.costs = {path: np.zeros(len(LEVELS)) for path in steps}
        self.positions = 0
        self._seed = seed

    def add(
        self,
        model: nn.Module,
        harness: observe.Harness,
        window: np.ndarray,
        current: Mapping[str, float] | None = None,
    ) -> None:
        """Add one window (length,) of tokens, of even length: its second half, after a dense prompt.

        current: thresholds of the sparse model to price from; None for the dense one.
        """
        prompt, rest = mx.split(mx.array(window[None]), 2, axis=1)
        shapes: dict[str, mx.array] = {}
        harness.inputs = shapes
        cache = observe.prompt_cache(model, prompt)
        harness.inputs = None
        continued = _Continuation(model, harness, rest, cache, {path: x.shape for path, x in shapes.items()})
        draw = np.random.default_rng(self._seed + self.positions)
        if current is not None:
            dense = np.exp(scoring.log_probabilities(observe.continuation(model, rest, cache)))
            harness.masking = observe.Masking(current)
            for path, x, g in continued.gradients(lambda p: p - dense):
                self.costs[path] += (self._moved(path, x, g, current[path])).sum(axis=0)
        for path, x, g in continued.gradients(lambda p: less_drawn(p, draw)):
            moved = self._moved(path, x, g, 0.0 if current is None else current[path])
            self.costs[path] += (moved**2).sum(axis=0) / 2
        harness.masking = None
        self.positions += rest.shape[1]

    def _moved(self, path: str, x: np.ndarray, g: np.ndarray, current: float) -> np.ndarray:
        """Each row's first-order change of the loss from `current` to each step: (rows, levels)."""
        now = (x * g * (np.abs(x) < current)).sum(axis=1, keepdims=True)
        return now - dropped(x, g, self.steps[path])


class _Continuation:
    """A window's second half, to be differentiated."""

    def __init__(
        self,
        model: nn.Module,
        harness: observe.Harness,
        rest: mx.array,
        cache: list[Any],
        shapes: dict[str, Any],
    ) -> None:
        self.model, self.harness, self.rest, self.cache, self.shapes = model, harness, rest, cache, shapes

    def gradients(
        self, slope: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each layer's path, input and the gradient there: (rows, inputs) each.

        slope: the loss's derivative with respect to the logits, given softmax(logits).
        """
        inputs: dict[str, mx.array] = {}

        def objective(shifts: dict[str, mx.array]) -> mx.array:
            self.harness.shifts = shifts
            logits = observe.continuation(self.model, self.rest, self.cache)
            p = np.exp(scoring.log_probabilities(logits))
            return (logits * mx.array(slope(p))).sum()

        self.harness.inputs = inputs
        try:
            with blas.many_rows():
                found = mx.grad(objective)({path: mx.zeros(shape) for path, shape in self.shapes.items()})
                mx.eval(found, inputs)
        finally:
            self.harness.shifts = self.harness.inputs = None
        for path, x in inputs.items():
            yield path, _rows(x), _rows(found[path])


def _rows(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])


def less_drawn(p: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """d -log p(y) / d logits for a y drawn from each p: p less one at y; p (..., vocab) is changed."""
    below = np.cumsum(p, axis=-1, dtype=np.float64)
    drawn = (below < draw.random((*p.shape[:-1], 1)) * below[..., -1:]).sum(axis=-1, keepdims=True)
    np.put_along_axis(p, drawn, np.take_along_axis(p, drawn, -1) - 1, -1)
    return p


def dropped(x: np.ndarray, g: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Per row, what skipping at each step takes off x . g: (rows, levels), float64.

    x, g: (rows, inputs); steps: (levels,), rising thresholds.
    """
    rows, levels = x.shape[0], len(steps)
    # a channel is skipped from the first step that lies above it
    level = np.searchsorted(steps, np.abs(x).ravel(), side="right")
    place = np.repeat(np.arange(rows) * (levels + 1), x.shape[1]) + level
    sums = np.bincount(place, weights=(x * g).ravel(), minlength=rows * (levels + 1))
    return sums.reshape(rows, levels + 1)[:, :-1].cumsum(axis=1)
