"""Counts of active channels while generating: what sparsity was really reached.

Decode steps are counted, of one row or of many; prompts are not. Counts stay on the device and are added up
there, so that decoding never waits for them. Where even that costs time, only some of the steps are counted.
A loop that decodes several requests together says whose rows they are (`rows_of`), and `Counter.shares` tells
them apart.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

Request = int | str


class _Here(threading.local):
    """A thread's counters, the innermost block's last: a server decodes in a thread of its own."""

    def __init__(self) -> None:
        self.counters: list[Counter] = []


_here = _Here()
_rows_of: ContextVar[tuple[Request, ...]] = ContextVar("spqt_rows_of", default=())


class Tally:
    """The running counts of groups of layers that run in one call.

    groups: each has `layers`, each of those `inputs`. running: what the next step is to count on from, one
    uint32 array for each group: (layers,) for steps of one row, else (layers, in_step + 1), whose last is the
    channels that were read. requests: whose rows they are, if that is known.
    """

    EVALUATE_EVERY = 32  # steps: a backend that adds up outside its kernels leaves a lazy sum
    LONGEST = 1 << 15  # rows that one uint32 count takes, for layers of up to 65,536 inputs, and to spare

    def __init__(self, groups: Sequence[Any], in_step: int = 1, requests: tuple[Request, ...] = ()) -> None:
        self.groups, self.in_step = groups, in_step
        self.reads_all = False  # of the weights, whatever is active
        self.requests = requests if len(requests) == in_step else ()
        self.steps = 0  # that were counted
        self.rows = 0  # of them: tokens
        self.calls = 0  # counted or not
        self._held = 0  # rows in `running`
        self.running: Sequence[mx.array] = self._zeros()
        self._finished: list[Sequence[mx.array]] = []
        self._since: list[Sequence[mx.array]] = []  # one entry: the counts that are still running

    def _zeros(self) -> list[mx.array]:
        rows = (self.in_step + 1,) if self.in_step > 1 else ()
        return [mx.zeros((len(group.layers), *rows), mx.uint32) for group in self.groups]

    def keep(self, counted: Sequence[Any], rows: int | None = None) -> None:
        """Take the counts after one more step, arrays as in `running`; rows: of it, if not `in_step`."""
        rows = self.in_step if rows is None else rows
        self.steps += 1
        self.rows += rows
        self._held += rows
        self.running, self._since = counted, [counted]
        if self.steps % self.EVALUATE_EVERY == 0:
            mx.async_eval(counted)
        if self._held + rows > self.LONGEST:
            self._finished.append(counted)
            self.running, self._since, self._held = self._zeros(), [], 0

    def totals(self) -> Iterator[tuple[Any, list[int], int]]:
        """Each layer, the channels that were active in each row of a step, and those read, over the steps."""
        parts = self._finished + self._since
        if not parts:  # a step was begun, and none was ended
            return
        for at, group in enumerate(self.groups):
            sums = np.sum([np.array(part[at], np.int64) for part in parts], axis=0, dtype=np.int64)
            for layer, numbers in zip(
                group.layers, sums.reshape(len(group.layers), -1).tolist(), strict=True
            ):
                yield layer, numbers[: self.in_step], numbers[-1]


class One(NamedTuple):
    """A layer that runs alone, as a tally wants its groups."""

    layers: list[Any]


class Share(NamedTuple):
    """What one layer did. active: fraction of its channels, the mean over rows; read: fraction of its weights
    that was read, the mean over steps: what is active in one row, and what any needs of several that are
    multiplied together. Steps in which that isn't known are taken to read all. Of experts a row is a token
    with one of the experts chosen for it, and `read` is of these experts' weights.
    rows: the mean over steps: of a token's step, the experts that it was sent to, 1 in other layers.
    """

    layer: Any
    active: float
    read: float
    rows: float


class Counter:
    """Active channels of all layers that ran in a block; of every `every`-th step, the first one included."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._tallies: dict[Any, Tally] = {}
        self._many: dict[int, Tally] = {}  # of steps of many rows, by layer
        self._steps: dict[int, int] = {}

    def tally(self, groups: Sequence[Any], rows: int = 1) -> Tally | None:
        """The tally of these groups, known by the sequence's identity, for steps of so many rows.

        None where a step isn't counted.
        """
        key = id(groups), rows, _rows_of.get()
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally(groups, *key[1:])
        return self._due(tally)

    def count_rows(self, layer: Any, active: mx.array) -> None:
        """Count a step of many rows through `layer`. active: (rows,), the active channels of each."""
        tally = self._many.get(id(layer))
        if tally is None:
            tally = self._many[id(layer)] = Tally([One([layer])])
        if self._due(tally) is not None:
            tally.keep([tally.running[0] + active.sum().astype(mx.uint32)], active.size)

    def _due(self, tally: Tally) -> Tally | None:
        tally.calls += 1
        return tally if self.every == 1 or tally.calls % self.every == 1 else None

    def stepped(self, model: Any) -> None:
        """Note one decode step of a model."""
        self._steps[id(model)] = self._steps.get(id(model), 0) + 1

    def steps(self, model: Any) -> int:
        """The decode steps of a model that were noted: those of requests alone, not of batches."""
        return self._steps.get(id(model), 0)

    def requests(self) -> list[Request]:
        """The requests whose rows were told apart."""
        return list(dict.fromkeys(one for tally in self._tallies.values() for one in tally.requests))

    def shares(self, request: Request | None = None) -> list[Share]:
        """What each counted layer did; for one request: in its rows, the steps being those that it was in."""
        sums: dict[int, tuple[Any, int, int, int, int, int]] = {}
        for tallies, many in ((self._tallies, False), (self._many, True)):
            for tally in tallies.values():
                if request is not None and request not in tally.requests:
                    continue
                for layer, rows, read in tally.totals():
                    # with one matrix: of experts, one for each row
                    products = tally.steps if many else tally.rows // tally.in_step
                    active, fed = sum(rows), tally.rows
                    if request is not None:
                        active, fed = rows[tally.requests.index(request)], products
                    _, *before = sums.get(id(layer), (layer, 0, 0, 0, 0, 0))
                    whole = products * layer.inputs  # also where eight rows each read a matrix once more
                    reads_all = many or tally.reads_all
                    more = (active, fed, whole if reads_all else min(read, whole), products, tally.steps)
                    sums[id(layer)] = layer, *map(sum, zip(before, more, strict=True))
        return [
            Share(layer, active / rows / layer.inputs, read / products / layer.inputs, rows / steps)
            for layer, active, rows, read, products, steps in sums.values()
        ]

    def densities(self) -> list[tuple[Any, float]]:
        """Each counted layer with its density, the mean over rows."""
        return [(share.layer, share.active) for share in self.shares()]


def current() -> Counter | None:
    """The counter of the block that this runs in, if there is one."""
    return _here.counters[-1] if _here.counters else None


@contextmanager
def rows_of(requests: Sequence[Request]) -> Iterator[None]:
    """The rows of steps in this block are these requests', in their order."""
    before = _rows_of.set(tuple(requests))
    try:
        yield
    finally:
        _rows_of.reset(before)


@contextmanager
def counting(every: int = 1) -> Iterator[Counter]:
    """Count in this block, every `every`-th step: `with counting() as counter`."""
    counter, counters = Counter(every), _here.counters
    counters.append(counter)
    try:
        yield counter
    finally:  # maybe late, while another counts: where a loop was left half done
        counters.remove(counter)


@contextmanager
def counting_by(counter: Any) -> Iterator[None]:
    """Count in this block by another counter; None: not at all."""
    _here.counters.append(counter)
    try:
        yield
    finally:
        _here.counters.pop()
