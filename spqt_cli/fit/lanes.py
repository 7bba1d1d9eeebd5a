"""Lanes of a student that run side by side: the caller's, and others in threads of their own.

Half of a pass on the CPU is work of MLX and numpy on one core; texts that pass on different threads, each
with its part of the cores for products, keep all of them busy.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from spqt_cli.backends import cpu
from spqt_cli.fit.lane import Lane
from spqt_cli.measure import blas
from spqt_cli.system.worker import Worker, workers

T = TypeVar("T")


class Lanes:
    """first: the caller's lane, the only one outside of `several`."""

    def __init__(self, first: Lane) -> None:
        self.first = first
        self._others: list[tuple[Lane, Worker]] = []

    def __len__(self) -> int:
        return 1 + len(self._others)

    @property
    def all(self) -> list[Lane]:
        """Every lane, the caller's first."""
        return [self.first, *(lane for lane, _ in self._others)]

    @contextmanager
    def several(self, count: int, make: Callable[[], Lane]) -> Iterator[None]:
        """In this block there are so many lanes. make: another lane, called in the thread that will run it:
        what MLX has not computed yet belongs to a thread.
        """
        with workers(count - 1) as threads:
            try:
                self._others = [(thread.submit(make).result(), thread) for thread in threads]
                for lane in self.all if count > 1 else ():
                    lane.threads = max(1, blas.threads() // count)
                yield
            finally:
                self._others = []
                self.first.threads = None

    def run(self, jobs: Sequence[Callable[[Lane], T]]) -> list[T]:
        """Call jobs, each lane every so many of them in order; their results. Raises what a job raises."""
        count = len(self)
        if count == 1 or len(jobs) == 1:
            return [job(self.first) for job in jobs]
        with _parts_of_the_cores(count):
            running: list[Future[list[T]]] = []
            try:
                for i, (lane, thread) in enumerate(self._others, 1):
                    running.append(thread.submit(partial(_each, jobs[i::count], lane)))
                found = [_each(jobs[::count], self.first), *(one.result() for one in running)]
            finally:
                for one in running:
                    one.exception()  # nobody works on when this returns
        return [found[i % count][i // count] for i in range(len(jobs))]

    def each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """As `run`, of functions that need no lane."""
        return self.run([partial(_without, job) for job in jobs])


def _each(jobs: Sequence[Callable[[Lane], T]], lane: Lane) -> list[T]:
    return [job(lane) for job in jobs]


def _without(job: Callable[[], T], _: Lane) -> T:
    return job()


@contextmanager
def _parts_of_the_cores(count: int) -> Iterator[None]:
    """In this block a product takes one of so many parts of them."""
    ours = cpu.threads() if cpu.status()[0] else 0
    with blas.limited(max(1, blas.threads() // count)):
        try:
            if ours:
                cpu.set_threads(max(1, ours // count))
            yield
        finally:
            if ours:
                cpu.set_threads(ours)
