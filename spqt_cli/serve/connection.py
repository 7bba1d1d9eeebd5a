"""A client's socket: read within bounds of time and size, and looked at for whether the client is there."""

import contextlib
import io
import select
import socket
import time
from typing import TYPE_CHECKING

from spqt_cli.serve.refusal import ClientGone, Refusal

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class BoundedReader(io.RawIOBase):
    """A socket's bytes until `seconds` from now, however slowly they drip, and at most `left` of them."""

    def __init__(self, connection: socket.socket, seconds: float, left: int) -> None:
        super().__init__()
        self._connection, self._end = connection, time.monotonic() + seconds
        self.left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Raises Refusal: 408 when the time is over, 431 when the bytes are."""
        if self.left <= 0:
            raise Refusal(431, "the headers are too long")
        remaining = self._end - time.monotonic()
        if remaining <= 0:
            raise Refusal(408, "the request came too slowly")
        self._connection.settimeout(remaining)
        try:
            count = self._connection.recv_into(memoryview(buffer)[: self.left])
        except TimeoutError:
            raise Refusal(408, "the request came too slowly") from None
        self.left -= count
        return count


class Client:
    """Who waits for an answer. `left` turns true when the connection is closed, also for one direction."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.left = False

    def check(self) -> None:
        """Look, without waiting. Raises ClientGone. What is sent after the request is thrown away."""
        if not self.left and has_more(self._connection):
            try:
                self.left = not self._connection.recv(4096)
            except OSError:
                self.left = True
        if self.left:
            raise ClientGone


def has_more(connection: socket.socket) -> bool:
    """Whether something came that was not read: bytes, or the end."""
    looking = select.poll()
    looking.register(connection, select.POLLIN)
    return bool(looking.poll(0))


def linger(connection: socket.socket, seconds: float) -> None:
    """Say that nothing more is sent, then throw away what comes until the client closes or time is over.

    A socket that is closed with bytes unread is reset, which can take the answer from the client.
    """
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (remaining := end - time.monotonic()) > 0:
            connection.settimeout(remaining)
            if not connection.recv(1 << 16):
                return
