"""Several processes on the loopback that run one model together, through MLX's ring."""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

TRIES = 3  # a port may be taken between the look for it and its use
TAKEN = ("Couldn't bind", "Address already in use", "errno: 98", "Couldn't connect")


class Ended(NamedTuple):
    """What one process left. code: negative where a signal ended it."""

    code: int
    out: str
    err: str


def ring(
    count: int, command: Sequence[object], timeout: float = 240, changes: Sequence[dict[str, str]] = ()
) -> list[Ended]:
    """Run a command in `count` processes that are connected; afterwards all have ended, if need be by force.

    changes: of the environment, for each process. Where one fails the others have ten seconds.
    """
    for left in reversed(range(TRIES)):
        found = _ring(count, command, timeout, changes)
        if not left or not any(sign in one.err for one in found for sign in TAKEN):
            return found
    raise AssertionError("not reached")


def _ring(
    count: int, command: Sequence[object], timeout: float, changes: Sequence[dict[str, str]]
) -> list[Ended]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        children, outputs = [], []
        for rank in range(count):
            pair = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            environment = os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            environment |= {"SPQT_THREADS": "1"}  # more would wait for one another by spinning
            environment |= changes[rank] if changes else {}
            outputs.append(pair)
            streams = {"stdin": subprocess.DEVNULL, "stdout": pair[0], "stderr": pair[1]}
            child = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, **streams)
            children.append(child)
        _wait(children, timeout)
        texts = []
        for pair in outputs:
            for file in pair:
                file.seek(0)
            texts.append([file.read() for file in pair])
        return [Ended(child.returncode, *text) for child, text in zip(children, texts, strict=True)]


def _wait(children: list[subprocess.Popen[bytes]], timeout: float) -> None:
    until = time.monotonic() + timeout
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            until = min(until, time.monotonic() + 10)
        if time.monotonic() > until:
            for child in children:
                child.kill()
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
