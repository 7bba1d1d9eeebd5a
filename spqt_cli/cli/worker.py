"""Runs commands that run a model in a child process, so that its end by a signal becomes one line.

MLX can end its process where Python can't catch it, and so can the system. The parent imports nothing
heavy, costs a tenth of a second, and says in a line what happened.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from spqt_cli.errors import BackendError, ResourceError, SpqtError
from spqt_cli.system import launched

MARK = "SPQT_WORKER"  # set in the child's environment
COMMANDS = ("generate", "run", "chat", "compare", "eval", "bench", "calibrate", "serve")
AT_ONCE = (
    3.0  # seconds after a SIGTERM in which a child ends by itself, unless it is within one long call of MLX
)
BOTH_TOLD = 0.3  # seconds in which a child that was interrupted as well ends by itself
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def wanted(arguments: Sequence[str]) -> bool:
    """True in the parent, for a command that runs a model."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    asks_for_help = {"-h", "--help"} & set(arguments)
    runs = command in COMMANDS or (command == "convert" and _calibrates(arguments))
    return runs and not asks_for_help and MARK not in os.environ


def _calibrates(arguments: Sequence[str]) -> bool:
    asked = "--calibrate" in arguments or any(one.startswith("--sparsity") for one in arguments)
    return asked and "--dry-run" not in arguments


def run(arguments: Sequence[str]) -> int:
    """The exit code of `spqt arguments` run in a child; SpqtError when a signal ended it."""
    # -P: no module is taken from the working directory, be it a checkout of ours or a folder of anybody's.
    command = [sys.executable, "-P", "-m", "spqt_cli", *arguments]
    child = subprocess.Popen(command, env={**os.environ, MARK: str(os.getpid())})

    told: list[int] = []

    def forward(number: int, frame: Any) -> None:
        told.append(number)
        child.send_signal(number)
        if number == signal.SIGTERM and "serve" not in arguments:  # a server ends its requests, then itself
            late = threading.Timer(AT_ONCE, child.kill)
            late.daemon = True
            late.start()

    def interrupted(number: int, frame: Any) -> None:
        if "serve" not in arguments:
            if _in_foreground():
                return  # a terminal's Ctrl-C reached the child as well, for which a second one means more
            time.sleep(BOTH_TOLD)
        forward(number, frame)

    signal.signal(signal.SIGTERM, forward)
    # A shell has what runs in a script's background ignore SIGINT: that stays so, but for a server.
    if "serve" in arguments or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)
    code = child.wait()
    if code >= 0:
        return code
    if -code in (signal.SIGINT, *told):
        return 128 - code
    if -code == signal.SIGKILL and signal.SIGTERM in told:
        return 128 + signal.SIGTERM
    raise _cause(-code)


def _in_foreground() -> bool:
    """Whether a terminal sends its Ctrl-C to this process and its child."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _cause(number: int) -> SpqtError:
    if number == signal.SIGKILL:
        return ResourceError(
            "the run was killed: most likely the system ran out of memory",
            "close other programs, or use a smaller model",
        )
    name = signal.Signals(number).name
    if launched.size() > 1:
        return BackendError(
            f"the run was ended by {name}: most likely another of the {launched.size()} processes ended",
            "see what they printed, and whether the machines reach one another",
        )
    return BackendError(
        f"the run was ended by {name}: MLX, the GPU or its driver gave up; the model's folder is unharmed",
        "free memory, or try a shorter text or --prefill-step-size 512; see spqt doctor --selftest",
    )


def follow_parent() -> None:
    """In the child, on Linux: end when the parent is killed, instead of decoding for nobody."""
    if MARK in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
