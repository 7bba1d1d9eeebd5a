"""How a signal ends a command: by an exception, so that what it holds is let go, and without a traceback.

Python drops an exception that a signal's handler raises in a destructor or a callback, and prints it: the
signal would be lost, and the command would run on. Here it is sent once more, and nothing is printed.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spqt_cli.errors import Terminated

AGAIN = 0.02  # seconds till a dropped signal is sent once more
BOTH_TOLD = 0.5  # seconds in which a second SIGTERM is the same: `timeout` tells a group, and our parent us

_told = -BOTH_TOLD  # when SIGTERM came (time.monotonic)


@contextmanager
def by_exceptions() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread here, as SIGINT raises KeyboardInterrupt.

    Afterwards both are the system's: while the interpreter ends, an exception would only be printed, and a
    parent may pass on what a group's signal has told us already.
    """
    before = sys.unraisablehook
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = _dropped
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.unraisablehook = before


def terminate(number: int, frame: Any) -> None:
    """SIGTERM's handler."""
    global _told  # noqa: PLW0603 - of the process, as the signal is
    now = time.monotonic()
    if now - _told >= BOTH_TOLD:
        _told = now
        raise Terminated(128 + number)


def _dropped(what: "sys.UnraisableHookArgs") -> None:
    global _told
    if isinstance(what.exc_value, Terminated):
        number, _told = signal.SIGTERM, -BOTH_TOLD
    elif isinstance(what.exc_value, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        sys.__unraisablehook__(what)
        return
    # From another thread, and later: here the exception would be dropped again.
    timer = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
