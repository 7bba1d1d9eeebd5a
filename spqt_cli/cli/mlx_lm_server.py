"""`spqt mlx-lm server`: it ends when it is told to.

mlx-lm's server was seen to stay after it was told to end. It holds nothing that would be lost, so a
signal ends the process at once.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from spqt_cli.decode import foreign
from spqt_cli.errors import SpqtError


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """While mlx-lm's server runs: SIGTERM and SIGINT end the process, and an error the generating thread."""
    from mlx_lm import server

    generator: Any = server.ResponseGenerator
    begin, started = generator.__init__, []

    def beginning(self: Any, *args: Any, **kwargs: Any) -> None:
        started.append(self)
        begin(self, *args, **kwargs)

    in_main = threading.current_thread() is threading.main_thread()  # where alone signals can be taken
    numbers = (signal.SIGTERM, signal.SIGINT) if in_main else ()
    handlers = {number: signal.signal(number, _end) for number in numbers}
    try:
        with foreign.replaced([(generator, "__init__", beginning)]):
            yield
    except SpqtError as error:  # an orderly exit was seen to end in an abort
        atexit.register(_leave, error.exit_code)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in started:
            one._stop = True  # a port that is taken is met after this thread has begun


def _end(number: int, frame: Any) -> NoReturn:
    _leave(128 + number)


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the signal struck amid a flush
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
