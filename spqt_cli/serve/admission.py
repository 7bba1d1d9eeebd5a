"""How many requests run and how many wait for their turn, first come first served."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spqt_cli.serve.refusal import Refusal

LOOK_SECONDS = 0.25  # between looks at whether a waiting client is still there


class Admission:
    """At most `most_running` at a time, at most `most_waiting` behind them."""

    def __init__(self, most_running: int, most_waiting: int) -> None:
        self.most_running, self.most_waiting = most_running, most_waiting
        self.running = 0
        self._turn = threading.Condition()
        self._queue: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @contextmanager
    def slot(self, check: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """One's turn, given back at the end, or before by the function that is yielded.

        check: called while waiting; raises for who gives up. Raises Refusal (429) when the queue is full.
        """
        ticket = object()
        with self._turn:
            if len(self._queue) + self.running >= self.most_running + self.most_waiting:
                raise Refusal(429, "the queue is full, try again later", code="queue_full")
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self.running >= self.most_running:
                    self._turn.wait(LOOK_SECONDS)
                    check()
                self.running += 1
            finally:
                self._queue.remove(ticket)
                self._turn.notify_all()
        held = [ticket]

        def give_back() -> None:
            with self._turn:
                if held:
                    held.clear()
                    self.running -= 1
                    self._turn.notify_all()

        try:
            yield give_back
        finally:
            give_back()
