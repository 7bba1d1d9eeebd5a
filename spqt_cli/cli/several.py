"""The command line where it runs in several processes: the first one alone speaks, and none stays behind.

A process that fails ends at once, also where MLX waits for the others; then a launcher ends those, or the
lost connection does.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from spqt_cli.errors import ElsewhereError, SpqtError, UsageError
from spqt_cli.system import launched

TOGETHER = ("generate", "run", "serve", "bench", "mlx-lm")  # commands that several processes run together


def check(arguments: Sequence[str]) -> None:
    """Refuse (exit 2) a command line that runs in one process, where several were started."""
    command = next((one for one in arguments if not one.startswith("-")), "")
    if command == "bench" and "--kernel" in arguments:
        command = "bench --kernel"
    if command and command not in TOGETHER:
        raise UsageError(
            f"spqt {command} runs in one process, and {launched.size()} were started",
            f"start it without mlx.launch; these run in several: {', '.join(TOGETHER)}",
        )


@contextlib.contextmanager
def one_of_them(debug: bool) -> Iterator[None]:
    """Around a command: silence in all but the first process, and an end by signals at once.

    debug: tracebacks are shown by all.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if launched.rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the process's end
        if not debug:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield
    except SystemExit as end:
        if end.code:
            _leave(end.code)
        raise


def fail(error: SpqtError) -> None:
    """Say which process failed, where it is not the first. What all of them find wrong the first one says."""
    told = getattr(error, "told_by_first", isinstance(error, (UsageError, ElsewhereError)))
    if launched.rank() and not told:
        print(f"spqt: process {launched.rank()}: {error.cause}"[:1000], file=sys.__stderr__, flush=True)


def _leave(code: Any) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
