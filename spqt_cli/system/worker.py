"""Threads that run MLX, and live as long as the process.

One that ends while Python does can end the process with it: what MLX keeps for a thread is freed after Python
has let go of it, and asks for Python again (seen as an abort, mlx 0.32.4).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """A thread that calls functions one after another."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._last: Future[Any] | None = None
        Thread(target=self._work, daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Have a function called; its result, or what it raises, will be in the future."""
        future: Future[T] = Future()
        self._last = future
        self._calls.put((future, function))
        return future

    @property
    def is_idle(self) -> bool:
        """Whether all that was asked for is done."""
        return self._last is None or self._last.done()

    def _work(self) -> None:
        while True:
            _answer(*self._calls.get())


def _answer(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        found = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(found)


_idle: list[Worker] = []
if hasattr(os, "register_at_fork"):  # a forked child has none of these threads
    os.register_at_fork(after_in_child=_idle.clear)


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """So many, that nobody else has in this block."""
    taken = [_idle.pop() if _idle else Worker() for _ in range(count)]
    try:
        yield taken
    finally:
        _idle.extend(one for one in taken if one.is_idle)  # an interrupt may leave one at work
