"""A connection that the other side closed or reset is noticed, on Linux by the system's list of sockets."""

import socket
import struct

import pytest

from spqt_cli.system import peers

AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset, as the system does for a killed process


@pytest.mark.parametrize("reset", [False, True])
def test_a_lost_peer_is_noticed(reset: bool):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            theirs, _ = listener.accept()
            known: set[peers.Ends] = set()
            assert not peers._is_closed(frozenset([port]), known)
            assert len(known) == 2  # both ends are in this process
            if reset:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            theirs.close()
            assert peers._is_closed(frozenset([port]), known)
            assert not peers._is_closed(frozenset([port + 1]), set())
