"""A server of spqt's in this process, and requests as bytes."""

import contextlib
import json
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spqt_cli.decode import session
from spqt_cli.format.folder import Folder
from spqt_cli.serve import server
from spqt_cli.serve.guard import Guard

NAME = "tiny"
ARGUMENTS = {
    "model": NAME, "draft_model": None, "num_draft_tokens": 3, "trust_remote_code": False, "temp": 0.0,
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 8,
    "decode_concurrency": 1, "prompt_concurrency": 8, "prefill_step_size": 64, "prompt_cache_size": 4,
    "prompt_cache_bytes": None, "adapter_path": None, "pipeline": False,
}  # fmt: skip


@contextlib.contextmanager
def serving(
    folder: Path, guard: Guard | None = None, limits: server.Limits | None = None, **arguments: Any
) -> Iterator[server.Service]:
    """A service that is ready, on a free port of the loopback."""
    one = starting(folder, guard, limits, **arguments)
    try:
        assert one.get_ready()
        yield one
    finally:
        one.close()


def starting(
    folder: Path, guard: Guard | None = None, limits: server.Limits | None = None, **arguments: Any
) -> server.Service:
    """A service that loads."""
    found = Folder(folder)
    return server.Service(
        server.Server("127.0.0.1", 0, guard or Guard(), limits or server.Limits()),
        lambda: session.load(found, draft_model=arguments.get("draft_model")),
        Namespace(**ARGUMENTS | server.UNUSED | {"chat_template_args": {}} | arguments),
        server.served(NAME, str(folder), found.size("vocab_size")),
    )


def port(service: server.Service) -> int:
    return service.server.server_address[1]


def request(body: Any, path: str = "/v1/completions", method: str = "POST", **headers: str) -> bytes:
    """A request as it goes over the wire; a header of None is left out, bytes are a body as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "127.0.0.1", "Content-Length": str(len(data))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def exchange(port: int, data: bytes) -> tuple[int, bytes]:
    """(status, body) of the answer to raw bytes; 0 where the connection was closed without one."""
    with connect(port) as connection:
        with contextlib.suppress(OSError):  # refused before all was sent
            connection.sendall(data)
        return answer(connection)


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """(status, body) of what comes until the end."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """The seconds until it holds; fails where it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come about in time"
        time.sleep(0.005)
    return time.monotonic() - start
