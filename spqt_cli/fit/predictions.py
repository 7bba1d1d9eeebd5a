"""How far a model's predictions are from its source's, and the slopes of that by its last hidden states.

Logits are made of a few positions at a time: those of a window may be larger than a block.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import numpy as np

from spqt_cli.measure import many_rows, scoring

PIECE_BYTES = 32 << 20  # of logits in float32, of which a few arrays are there at once
FIRST_SCORED = 8  # the first positions predict from nearly nothing
PROMPT_WEIGHT = 0.5  # of a prompt's positions, all together, where decode steps have 1

# Hidden states (1, rows, width) and other arrays of the model -> logits (1, rows, vocab).
Head = Callable[..., mx.array]


def weights(window: int) -> np.ndarray:
    """What each position's divergence counts in a window's loss: (window,) float32; their sum is 1."""
    half = window // 2
    first = min(FIRST_SCORED, half // 2)
    found = np.zeros(window, np.float32)
    found[first:half] = PROMPT_WEIGHT / (half - first)
    found[half:] = 1 / (window - half)
    return found / np.float32(1 + PROMPT_WEIGHT)


def pieces(window: int, vocab: int) -> list[slice]:
    """Positions whose logits are made together."""
    size = max(1, PIECE_BYTES // (4 * vocab))
    return [slice(start, min(start + size, window)) for start in range(0, window, size)]


def divergence(wanted: mx.array, got: mx.array, weight: np.ndarray) -> mx.array:
    """The weighted sum of KL(wanted || got) over positions: logits (1, rows, vocab), weight (rows,).

    Can be differentiated with respect to `got`.
    """
    return (_by_numpy if many_rows.on_cpu() else _by_mlx)(wanted, got, weight)


def _by_mlx(wanted: mx.array, got: mx.array, weight: np.ndarray) -> mx.array:
    log_p, log_q = (
        z - mx.logsumexp(z, axis=-1, keepdims=True)
        for z in (wanted.astype(mx.float32), got.astype(mx.float32))
    )
    p = mx.exp(log_p)
    ratio = mx.where(p > 0, log_p - log_q, 0)
    return ((p * ratio).sum(axis=-1) * mx.array(weight)).sum()


def _by_numpy(wanted: mx.array, got: mx.array, weight: np.ndarray) -> mx.array:
    slope = np.empty(0, np.float32)

    @mx.custom_function
    def forward(z: mx.array) -> mx.array:
        nonlocal slope
        log_q = scoring.log_probabilities(z)
        reference = scoring.Reference(scoring.log_probabilities(wanted))
        found = (scoring.divergence(reference, log_q) * weight).sum()
        slope = np.exp(log_q, out=log_q)
        slope -= reference.p
        slope *= weight[:, None]
        return mx.array(found, mx.float32)

    @forward.vjp
    def backward(z: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return (mx.array(slope) * cotangent).astype(z.dtype)

    return cast(mx.array, forward(got))


def loss(head: Head, source: Head, target: mx.array, hidden: mx.array) -> float:
    """The loss of one window. head, source: logits of the model and of its source, given hidden states
    (1, rows, width) and the slice of positions that these are of."""
    weight = weights(hidden.shape[1])
    found = 0.0
    for rows in _cut(source, hidden):
        logits = head(hidden[:, rows], rows)
        part = divergence(source(target[:, rows], rows), logits, weight[rows])
        found += float(part)
    return found


def slopes(
    head: Head, source: Head, target: mx.array, hidden: mx.array, others: list[mx.array]
) -> tuple[float, mx.array, list[mx.array]]:
    """The loss of one window, and its slopes by hidden (1, window, width) and by other arrays.

    head takes the others after its slice; else as in `loss`.
    """
    weight = weights(hidden.shape[1])
    total, by_hidden, by_others = 0.0, [], [mx.zeros_like(a) for a in others]
    for rows in _cut(source, hidden):
        wanted = source(target[:, rows], rows)

        def objective(h: mx.array, *rest: mx.array, rows: slice = rows, wanted: mx.array = wanted) -> Any:
            return divergence(wanted, head(h, rows, *rest), weight[rows])

        (value,), (slope, *rest) = mx.vjp(objective, [hidden[:, rows], *others], [mx.array(1.0)])
        by_others = [a + b for a, b in zip(by_others, rest, strict=True)]
        by_hidden.append(slope)
        mx.eval(value, slope, by_others)
        total += float(value)
    return total, mx.concatenate(by_hidden, axis=1), by_others


def _cut(source: Head, hidden: mx.array) -> list[slice]:
    vocab = source(hidden[:, :1], slice(0, 1)).shape[-1]
    return pieces(hidden.shape[1], vocab)
