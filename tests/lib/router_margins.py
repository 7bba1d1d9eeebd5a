"""How near the routers of a running model come to choosing other experts, blocks or tokens.

A tie within rounding falls either way in another order of summation, and what follows is then another sum.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

FORBIDDEN = 1e30  # scores beyond it stand for what must not be chosen


@dataclass
class Margin:
    """routers: distance of the last chosen score from the first that isn't, over the largest of its row.
    steps: distance of a value that is rounded to a whole number from a half, over the largest of all.
    """

    routers: float = math.inf
    steps: float = math.inf


@contextmanager
def margins() -> Iterator[Margin]:
    """The margins of this block: of `mx.argpartition`, by which mlx-lm's routers choose, and of `round`."""
    found, stock, stock_round = Margin(), mx.argpartition, mx.array.round

    def watched(a: mx.array, kth: int, axis: int = -1) -> mx.array:
        scores = np.moveaxis(np.array(a.astype(mx.float32)), axis, -1)
        found.routers = min(found.routers, margin(scores, kth))
        return stock(a, kth, axis)

    def watched_round(a: mx.array, *rest: Any, **named: Any) -> mx.array:
        values = np.abs(np.array(a.astype(mx.float32)))
        distance = np.abs(values - np.floor(values) - 0.5).min() / max(values.max(), 1.0)
        found.steps = min(found.steps, float(distance))
        return stock_round(a, *rest, **named)

    mx.disable_compile()  # compiled functions have no values to look at
    setattr(mx, "argpartition", watched)  # noqa: B010
    setattr(mx.array, "round", watched_round)  # noqa: B010
    try:
        yield found
    finally:
        setattr(mx, "argpartition", stock)  # noqa: B010
        setattr(mx.array, "round", stock_round)  # noqa: B010
        mx.enable_compile()


def margin(scores: np.ndarray, kth: int) -> float:
    """scores (..., n), parted behind kth, or before it where it is negative and counts from the end."""
    ordered = np.sort(scores, axis=-1)
    last = kth if kth >= 0 else scores.shape[-1] + kth - 1
    if not 0 <= last < scores.shape[-1] - 1:
        return math.inf  # all are chosen, or none
    allowed = np.abs(ordered) < FORBIDDEN
    both = allowed[..., last] & allowed[..., last + 1]
    # Behind a ReLU many scores are exactly 0, in whatever order their products are summed.
    both &= (ordered[..., last] != 0) | (ordered[..., last + 1] != 0)
    largest = np.where(allowed, np.abs(ordered), 0).max(axis=-1)[both]
    distance = ordered[..., last + 1][both] - ordered[..., last][both]
    return float((distance / np.maximum(largest, np.finfo(np.float32).tiny)).min(initial=math.inf))
