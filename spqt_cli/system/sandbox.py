"""Limits of time and memory on work that a model's file dictates, such as its chat template.

transformers' own sandbox for templates limits neither time nor memory.
"""

import contextlib
import io
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from spqt_cli.errors import SpqtError, Terminated, UnsupportedError

SECONDS = 2.0
BYTES = 512 << 20  # of address space on top of what the process has; allocators take it in large steps
DAMAGED = "the model's files may be damaged or hostile"


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Stop the block after SECONDS, or when it takes more than BYTES more memory (SpqtError).

    Time is limited in the main thread only, where signals arrive; memory on Linux only, where the
    kernel enforces an address-space limit.
    """
    limits = contextlib.ExitStack()
    if threading.current_thread() is threading.main_thread():
        limits.enter_context(_time_limit(what))
    if sys.platform == "linux":
        limits.enter_context(_memory_limit())
    with limits:
        try:
            yield
        except MemoryError:
            raise SpqtError(f"{what} wants more than {BYTES >> 20} MB of memory", DAMAGED) from None


@contextlib.contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Turn an exit of the process, which mlx-lm's olmo asks for on import, into an UnsupportedError.

    what: whose code runs. What it prints becomes part of the error; none of it reaches stdout.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except Terminated:
        raise
    except SystemExit as end:
        words = " ".join(said.getvalue().split())[:200] or f"exit {end.code}"
        raise UnsupportedError(
            f"{what} ends the process: {words}", "do what it asks for, or use another model"
        ) from None
    if said.getvalue():
        sys.stderr.write(said.getvalue())


@contextlib.contextmanager
def _time_limit(what: str) -> Iterator[None]:
    def expire(number: int, frame: Any) -> NoReturn:
        raise SpqtError(f"{what} took more than {SECONDS:g} s", DAMAGED)

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + BYTES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
