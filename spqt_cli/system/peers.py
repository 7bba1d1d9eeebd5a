"""Ends this process where another one, which it would wait for without end, has closed its connection.

MLX's ring was seen to wait for ever once a peer had gone. Its sockets are known by the ports that the
launcher's list of hosts names; a socket that the other side closed stays in the state CLOSE_WAIT. One that it
reset, as the system does for a process that is killed with data unread, is gone from the system's list.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

from spqt_cli.errors import BackendError

LOOK_SECONDS, LOST_LOOKS = 1.0, 5  # a peer that has finished closes too: this process then ends by itself
NAME = "spqt-peers"
Ends = tuple[Any, Any]  # of a connection: our address and the other's
_over = threading.Event()


def watch() -> None:
    """Watch from now on, in a thread that keeps nothing from ending, if the processes talk through a ring."""
    if (ports := _ports()) and not any(one.name == NAME for one in threading.enumerate()):
        threading.Thread(target=_until_lost, args=(ports, _end), name=NAME, daemon=True).start()


def stop() -> None:
    """Nothing is waited for any more: the others may leave."""
    _over.set()


def _until_lost(ports: frozenset[int], end: Callable[[], None]) -> None:
    seen, known = 0, set[Ends]()
    _is_closed(ports, known)
    while not _over.wait(LOOK_SECONDS):
        seen = seen + 1 if _is_closed(ports, known) else 0
        if seen == LOST_LOOKS:
            end()
            return


def _is_closed(ports: frozenset[int], known: set[Ends]) -> bool:
    """Whether the other side has closed or reset one of this process's connections from or to these ports.

    known: connections that were seen; those that are open now are added.
    """
    try:
        connections = psutil.Process().net_connections(kind="tcp")
    except (psutil.Error, OSError):  # not to be had here: nothing is known
        return False
    own = [one for one in connections if one.raddr and {one.laddr.port, one.raddr.port} & ports]
    open_now = {(one.laddr, one.raddr) for one in own if one.status == psutil.CONN_ESTABLISHED}
    known |= open_now
    return bool(known - open_now) or any(one.status == psutil.CONN_CLOSE_WAIT for one in own)


def _ports() -> frozenset[int]:
    """The ports of all processes of a ring; none where there is no ring."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return frozenset(int(address.rpartition(":")[2]) for host in hosts for address in host)
    except (KeyError, OSError, ValueError, TypeError, AttributeError):
        return frozenset()


def _end() -> NoReturn:
    rank = os.environ.get("MLX_RANK", "?")
    message = f"spqt: process {rank}: another process has ended, and this one would wait for it"
    print(message, file=sys.__stderr__, flush=True)
    os._exit(BackendError.exit_code)
