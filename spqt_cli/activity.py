"""Counts of active channels while generating: what sparsity was really reached.

Counts stay on the device and are added up there, so that decoding never waits for them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

_counter: "Counter | None" = None


class Counter:
    """Active channels per group of layers, and the number of sparse steps they were counted over."""

    FOLD_EVERY = 32  # steps whose counts are kept apart: bounds the small arrays that are alive

    def __init__(self) -> None:
        self._pending: dict[tuple[int, ...], list[mx.array]] = {}
        self._layers: dict[tuple[int, ...], list[Any]] = {}
        self._totals: dict[tuple[int, ...], mx.array] = {}
        self._steps: dict[tuple[int, ...], int] = {}

    def add(self, layers: Sequence[Any], active: mx.array) -> None:
        """active: (len(layers),) uint32, of one step."""
        key = tuple(map(id, layers))
        self._layers.setdefault(key, list(layers))
        waiting = self._pending.setdefault(key, [])
        waiting.append(active)
        self._steps[key] = self._steps.get(key, 0) + 1
        if len(waiting) >= self.FOLD_EVERY:
            self._fold(key)

    def _fold(self, key: tuple[int, ...]) -> None:
        waiting = self._pending[key]
        if waiting:
            # float32: exact below 2**24, and each term is a share of one layer's channels
            total = mx.stack(waiting).astype(mx.float32).sum(axis=0)
            if key in self._totals:
                total = total + self._totals[key]
            self._totals[key] = total
            mx.async_eval(total)
            waiting.clear()

    def densities(self) -> list[tuple[Any, float]]:
        """Each counted layer with the mean share of its channels that was active."""
        rows: list[tuple[Any, float]] = []
        for key, layers in self._layers.items():
            self._fold(key)
            totals: Any = self._totals[key].tolist()
            for layer, total in zip(layers, totals, strict=True):
                rows.append((layer, total / self._steps[key] / layer.inputs))
        return rows


def record(layers: Sequence[Any], active: mx.array) -> None:
    """Add one step's counts to the running counter, if there is one."""
    if _counter is not None:
        _counter.add(layers, active)


@contextmanager
def counting() -> Iterator[Counter]:
    """Count in this block: `with counting() as counter`."""
    global _counter  # noqa: PLW0603 - one decode loop per process owns it
    previous, _counter = _counter, Counter()
    try:
        yield _counter
    finally:
        _counter = previous
