"""How far a model's predictions are from its source's, and the slopes of that by its last hidden states.

Logits are made of a few positions at a time: those of a window may be larger than a block.
"""

from collections.abc import Callable
from typing import cast

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate.gradients import drawn_loss
from spqt_cli.measure import many_rows

PIECE_BYTES = 24 << 20  # of logits in float32, of which a few arrays are there at once
LEAST = np.float32(-1e30)  # of logits, which may be -inf
FIRST_SCORED = 8  # the first positions predict from nearly nothing
PROMPT_WEIGHT = 0.25  # of a prompt's positions, all together, where decode steps have 1

# Hidden states (1, rows, width), their positions and other arrays of the model -> logits (1, rows, vocab).
Head = Callable[..., mx.array]


def weights(window: int, prompt: int) -> np.ndarray:
    """What each position's divergence counts in a window's loss: (window,) float32; their sum is 1."""
    first = min(FIRST_SCORED, prompt // 2)
    found = np.zeros(window, np.float32)
    found[first:prompt] = PROMPT_WEIGHT / (prompt - first)
    found[prompt:] = 1 / (window - prompt)
    return found / np.float32(1 + PROMPT_WEIGHT)


def drawn(weight: np.ndarray, prompt: int, part: float, draw: np.random.Generator) -> np.ndarray:
    """The weights of a part of the positions, drawn from those of a prompt and from decode steps, which stand
    for all: (window,) float32, 0 for the others.
    """
    found = np.zeros_like(weight)
    for all_of in (slice(0, prompt), slice(prompt, None)):
        counted = np.flatnonzero(weight[all_of])
        some = all_of.start + draw.choice(counted, round(part * len(counted)), replace=False)
        found[some] = weight[some]
        found[all_of] *= weight[all_of].sum() / max(found[all_of].sum(), np.float32(1e-9))
    return found


def pieces(window: int, vocab: int) -> list[slice]:
    """Positions whose logits are made together."""
    size = max(1, PIECE_BYTES // (4 * vocab))
    return [slice(start, min(start + size, window)) for start in range(0, window, size)]


class Reference:
    """Predictions that others are held against: made of logits (1, rows, vocab)."""

    def __init__(self, logits: mx.array, weight: np.ndarray) -> None:
        """weight: (rows,), of each position's divergence."""
        self._weight = weight
        if many_rows.on_cpu():
            self._z, self._p, self._sum = _exponentials(logits)
            self._p /= self._sum
        else:
            self._log_p = _log_probabilities(logits)

    def divergence(self, logits: mx.array) -> mx.array:
        """The weighted sum of KL(reference || logits) over positions, with a gradient."""
        if many_rows.on_cpu():
            return self._by_numpy(logits)
        p = mx.exp(self._log_p)
        ratio = mx.where(p > 0, self._log_p - _log_probabilities(logits), 0)
        return ((p * ratio).sum(axis=-1) * mx.array(self._weight)).sum()

    def _by_numpy(self, logits: mx.array) -> mx.array:
        slope = np.empty(0, np.float32)

        @mx.custom_function
        def forward(y: mx.array) -> mx.array:
            nonlocal slope
            z, slope, total = _exponentials(y)
            np.subtract(self._z, z, out=z)
            found = np.vecdot(self._p, z) + np.log(total / self._sum)[..., 0]
            slope /= total
            slope -= self._p
            slope *= self._weight[:, None]
            return mx.array((found * self._weight).sum(), mx.float32)

        @forward.vjp
        def backward(z: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return (mx.array(slope) * cotangent).astype(z.dtype)

        return cast(mx.array, forward(logits))


def _exponentials(logits: mx.array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, exp(z) and its sum over the last axis, z being logits less the largest."""
    z = np.array(logits.astype(mx.float32))
    z -= z.max(axis=-1, keepdims=True)
    np.maximum(z, LEAST, out=z)
    e = np.exp(z)
    return z, e, e.sum(axis=-1, keepdims=True)


def _log_probabilities(logits: mx.array) -> mx.array:
    z = logits.astype(mx.float32)
    return z - mx.logsumexp(z, axis=-1, keepdims=True)


def loss(head: Head, source: Head, target: mx.array, hidden: mx.array, prompt: int) -> float:
    """The loss of one window. head, source: logits of the model and of its source, given hidden states
    (1, rows, width) and the positions that these are of. prompt: positions before decode steps."""
    weight = weights(hidden.shape[1], prompt)
    found = 0.0
    for rows in _cut(source, hidden):
        reference = Reference(source(target[:, rows], rows), weight[rows])
        found += float(reference.divergence(head(hidden[:, rows], rows)))
    return found


def slopes(
    head: Head, source: Head, target: mx.array, hidden: mx.array, others: list[mx.array], weight: np.ndarray
) -> tuple[float, mx.array, list[mx.array]]:
    """The loss of one window, and its slopes by hidden (1, window, width) and by other arrays.

    head takes the others after its positions; else as in `loss`. weight: of each position, (window,); logits
    are made of those alone whose weight is not 0.
    """
    total, by_hidden, by_others = 0.0, mx.zeros_like(hidden), [mx.zeros_like(a) for a in others]
    scored = np.flatnonzero(weight)
    for piece in _cut(source, hidden[:, : len(scored)]):
        rows = scored[piece]
        where = mx.array(rows)
        reference = Reference(source(target[:, where], rows), weight[rows])
        (value,), (slope, *rest) = mx.vjp(
            lambda h, *a, rows=rows, reference=reference: reference.divergence(head(h, rows, *a)),
            [hidden[:, where], *others],
            [mx.array(1.0)],
        )
        by_others = [a + b for a, b in zip(by_others, rest, strict=True)]
        by_hidden[:, where] = slope
        mx.eval(value, by_hidden, by_others)
        total += float(value)
    return total, by_hidden, by_others


def slopes_of_drawn(head: Head, hidden: mx.array, prompt: int, draw: np.random.Generator) -> mx.array:
    """The slopes of -log p(y) by hidden (1, window, width), y drawn from each prediction in decode steps."""
    found = [mx.zeros_like(hidden[:, :prompt])]
    for rows in _cut(head, hidden, prompt):
        _, (slope,) = mx.vjp(
            lambda h, rows=rows: drawn_loss(head(h, rows), draw), [hidden[:, rows]], [mx.array(1.0)]
        )
        mx.eval(slope)
        found.append(slope)
    return mx.concatenate(found, axis=1)


def _cut(head: Head, hidden: mx.array, first: int = 0) -> list[slice]:
    vocab = head(hidden[:, :1], slice(0, 1)).shape[-1]
    return [slice(first + rows.start, first + rows.stop) for rows in pieces(hidden.shape[1] - first, vocab)]
