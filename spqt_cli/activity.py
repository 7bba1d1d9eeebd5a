"""Counts of active channels while generating: what sparsity was really reached.

Counts stay on the device and are added up there, so that decoding never waits for them. Where even that
costs time, only some of the steps are counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

_counter: "Counter | None" = None


class Tally:
    """The running counts of groups of layers that run in one call.

    groups: each has `layers`, each of those `inputs`. running: what the next step is to count on from, one
    (layers,) uint32 for each group.
    """

    EVALUATE_EVERY = 32  # steps: a backend that adds up outside its kernels leaves a lazy sum
    LONGEST = 1 << 16  # steps that one uint32 count takes, for layers of up to 65,536 inputs

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = groups
        self.steps = 0  # that were counted
        self.calls = 0  # counted or not
        self.running: Sequence[mx.array] = self._zeros()
        self._finished: list[Sequence[mx.array]] = []
        self._since: list[Sequence[mx.array]] = []  # one entry: the counts that are still running

    def _zeros(self) -> list[mx.array]:
        return [mx.zeros(len(group.layers), mx.uint32) for group in self.groups]

    def keep(self, counted: Sequence[Any]) -> None:
        """Take the counts after one more step, arrays as in `running`."""
        self.steps += 1
        self.running, self._since = counted, [counted]
        if self.steps % self.EVALUATE_EVERY == 0:
            mx.async_eval(counted)
        if self.steps % self.LONGEST == 0:
            self._finished.append(counted)
            self.running, self._since = self._zeros(), []

    def totals(self) -> Iterator[tuple[Any, int]]:
        """Each layer and the channels that were active, summed over the steps."""
        parts = self._finished + self._since
        for at, group in enumerate(self.groups):
            lists: list[Any] = [part[at].tolist() for part in parts]
            for layer, *numbers in zip(group.layers, *lists, strict=True):
                yield layer, sum(numbers)


class Counter:
    """Active channels of all layers that ran in a block; of every `every`-th step, the first one included."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._tallies: dict[int, Tally] = {}

    def tally(self, groups: Sequence[Any]) -> Tally | None:
        """The tally of these groups, known by the sequence's identity; None where a step isn't counted."""
        tally = self._tallies.get(id(groups))
        if tally is None:
            tally = self._tallies[id(groups)] = Tally(groups)
        tally.calls += 1
        return tally if self.every == 1 or tally.calls % self.every == 1 else None

    def densities(self) -> list[tuple[Any, float]]:
        """Each counted layer with the mean share of its channels that was active."""
        sums: dict[int, tuple[Any, int, int]] = {}
        for tally in self._tallies.values():
            for layer, active in tally.totals():
                _, before, steps = sums.get(id(layer), (layer, 0, 0))
                sums[id(layer)] = layer, before + active, steps + tally.steps
        return [(layer, active / steps / layer.inputs) for layer, active, steps in sums.values()]


def current() -> Counter | None:
    """The counter of the block that this runs in, if there is one."""
    return _counter


@contextmanager
def counting(every: int = 1) -> Iterator[Counter]:
    """Count in this block, every `every`-th step: `with counting() as counter`."""
    global _counter  # noqa: PLW0603 - one decode loop per process owns it
    previous, _counter = _counter, Counter(every)
    try:
        yield _counter
    finally:
        _counter = previous
