"""What skipping costs, layer by layer, from gradients through the quantized model.

For small changes d of a layer's input the KL divergence of the model's predictions is half the
expectation of (d . g)^2, g being the gradient of -log p(y) with y drawn from the predictions
themselves (the Fisher information). d is what a threshold would set to zero, so one backward pass gives
the cost of every sparsity of every layer. No training, no labels, and the text's own next tokens are not
used. It measures; allocation.py decides which layer gets which sparsity.

Source: the second-order expansion of KL, as in natural gradients (Amari 1998); our measurements of
gradient allocation are in docs/quality.md.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.errors import ResourceError, UnsupportedError
from spqt_cli.measure import many_rows, probes, scoring

# Sparsities of one layer whose costs are measured; above the last no allocation was ever better.
SPARSITIES = tuple(i / 40 for i in range(37))  # 0, 0.025, ..., 0.9


class Sensitivity:
    """What each of SPARSITIES costs in each layer. costs: path -> (37,), float64: the KL divergence that
    this layer alone would cause, in nats, summed over `positions`.
    """

    def __init__(self, steps: Mapping[str, np.ndarray], seed: int) -> None:
        """steps: path -> the layer's thresholds at SPARSITIES, rising."""
        self.steps = steps
        self.costs = {path: np.zeros(len(SPARSITIES)) for path in steps}
        self.positions = 0
        self._seed = seed

    def add(self, model: nn.Module, harness: probes.Harness, window: np.ndarray, cache: list[Any]) -> None:
        """Add one window (length,) of tokens, of even length: its second half.

        cache: the model's after a dense pass over the first half; it stays as it was.
        """
        draw = np.random.default_rng(self._seed + self.positions)
        for path, x, gradient in _gradients(model, harness, window[len(window) // 2 :], cache, draw):
            if path in self.costs:
                self.add_rows(path, x, gradient)
        self.positions += len(window) // 2

    def add_rows(self, path: str, x: mx.array, gradient: mx.array) -> None:
        """Add positions of one layer: its input x and the gradient by it, (..., inputs) both."""
        change = dropped(_rows(x), _rows(gradient), self.steps[path])
        self.costs[path] += (change**2).sum(axis=0) / 2


def _gradients(
    model: nn.Module, harness: probes.Harness, rest: np.ndarray, cache: list[Any], draw: np.random.Generator
) -> list[tuple[str, mx.array, mx.array]]:
    """(path, input, gradient of -log p(drawn token) by that input) of every call of a layer."""

    with harness.differentiated() as slopes, many_rows.many_rows():

        def objective(origin: mx.array) -> mx.array:
            slopes.origin = origin
            return drawn_loss(probes.continuation(model, mx.array(rest[None]), cache), draw)

        differentiate(objective, slopes.origin)
        slopes.evaluate()
    return list(slopes.pairs())


def differentiate(objective: Callable[..., mx.array], *by: mx.array) -> Any:
    """The gradients of `objective` by all its arguments, evaluated. Raises as `gradient_errors` says."""
    with gradient_errors("gradients do", "use --method uniform"):
        found = mx.grad(objective, argnums=tuple(range(len(by))))(*by)
        mx.eval(found)
    return found


@contextmanager
def gradient_errors(what: str, hint: str) -> Iterator[None]:
    """Turn MLX's errors into ours: UnsupportedError of a missing gradient, ResourceError of memory.

    Memory that ran out is no reason to go on without gradients, or with more of the model in memory.
    what: that does not fit there, with its verb.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # MLX has no kinds of its own for these
        said = " ".join(str(error).split()).partition(". ")[0][:120]
        if "alloc" in said:
            raise ResourceError(f"{what} not fit in memory: {said}", hint) from error
        raise UnsupportedError(f"this model has no gradients: {said}", hint) from error


def _rows(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])


def drawn_loss(logits: mx.array, draw: np.random.Generator) -> mx.array:
    """A value whose gradient by the logits (..., vocab) is that of -log p(y), y drawn from each p."""
    slope = less_drawn(np.exp(np.array(scoring.log_probabilities(logits), copy=False)), draw)
    return (logits * mx.array(slope)).sum()


def less_drawn(p: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """d -log p(y) / d logits for a y drawn from each p: p less one at y; p (..., vocab) is changed."""
    below = np.cumsum(p, axis=-1, dtype=np.float64)
    drawn = (below < draw.random((*p.shape[:-1], 1)) * below[..., -1:]).sum(axis=-1, keepdims=True)
    np.put_along_axis(p, drawn, np.take_along_axis(p, drawn, -1) - 1, -1)
    return p


def dropped(x: np.ndarray, g: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Per row, what skipping at each threshold takes off x . g: (rows, thresholds), float64.

    x, g: (rows, inputs); steps: (thresholds,), rising.
    """
    rows, count = x.shape[0], len(steps)
    # A channel is skipped from the first threshold that lies above it. Comparing with every one takes less
    # than half of searchsorted's time, which looks values up one by one.
    size = np.abs(x)
    first = np.zeros(x.shape, np.uint8)
    for step in steps.astype(x.dtype):
        first += size >= step
    place = (first + np.arange(rows)[:, None] * (count + 1)).ravel()
    sums = np.bincount(place, weights=(x * g).ravel(), minlength=rows * (count + 1))
    return sums.reshape(rows, count + 1)[:, :-1].cumsum(axis=1)
