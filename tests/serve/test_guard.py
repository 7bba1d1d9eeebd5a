"""Who may ask: Host, Origin and the key."""

from email.message import Message

import pytest

from spqt_cli.errors import UsageError
from spqt_cli.serve import guard
from spqt_cli.serve.refusal import Refusal

KEY = "k" * 16


def status(
    one: guard.Guard, method: str = "POST", path: str = "/v1/models", at: str = "127.0.0.1", **sent: str
):
    """The status of a refusal, 200 where there is none. sent: headers."""
    headers = Message()
    for name, value in {"Host": "localhost:8080", **sent}.items():
        headers[name] = value
    try:
        one.check(method, path, headers, at)
    except Refusal as refused:
        return refused.status
    return 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:80", "LOCALHOST", "127.0.0.1:1", "127.0.0.9", "[::1]:80"]
)
def test_fault_72_loopback_names_are_ours(host):
    assert status(guard.Guard(), Host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "", "a b", "localhost:x",
     "x@localhost", "localhost/", "[::2]", "0.0.0.0", "localhost,evil.example"],
)  # fmt: skip
def test_fault_72_foreign_hosts_are_refused(host):
    assert status(guard.Guard(), Host=host) == 403


def test_fault_72_one_host_header_is_needed():
    headers = Message()
    with pytest.raises(Refusal) as none:
        guard.Guard().check("GET", "/health", headers, "127.0.0.1")
    headers["Host"] = "localhost"
    headers["Host"] = "localhost"
    with pytest.raises(Refusal) as two:
        guard.Guard().check("GET", "/health", headers, "127.0.0.1")
    assert none.value.status == two.value.status == 400


def test_names_that_are_given_and_the_address_that_was_reached_are_ours():
    one = guard.Guard(hosts=frozenset({"box.example"}))
    assert status(one, Host="box.example:8080") == 200
    assert status(one, Host="10.0.0.1", at="10.0.0.1") == 200
    assert status(one, Host="10.0.0.2", at="10.0.0.1") == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", "x"]
)
def test_fault_72_foreign_pages_are_refused(origin):
    assert status(guard.Guard(), Origin=origin) == 403
    assert status(guard.Guard(), method="OPTIONS", Origin=origin) == 403
    assert status(guard.Guard(origins=frozenset({"*"})), Origin=origin) == 200


def test_pages_of_this_machine_and_those_that_are_named_may_ask():
    one = guard.Guard(origins=frozenset({"https://chat.example"}))
    for origin in ("http://localhost:3000", "http://127.0.0.1:8080", "https://chat.example"):
        assert status(one, Origin=origin) == 200
    assert status(one, Origin="https://chat.example.evil") == 403


def test_the_key_is_asked_for_everywhere_but_where_it_can_not_be_sent():
    one = guard.Guard(key=KEY)
    assert status(one) == 401
    assert status(one, Authorization=f"Bearer {KEY}") == 200
    assert status(one, Authorization=f"bearer {KEY}") == 200
    for wrong in ("Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \u00e9"):
        assert status(one, Authorization=wrong) == 401
    assert status(one, path="/metrics") == 401
    assert status(one, path="/health") == 200
    assert status(one, method="OPTIONS") == 200


def test_the_key_is_in_no_text():
    assert KEY not in repr(guard.Guard(key=KEY))


@pytest.mark.parametrize(
    "key", ["", "short", "k" * 15, "with space in it all", "k" * 16 + "\n", "\u00e9" * 16]
)
def test_keys_that_can_not_be_sent_or_are_guessed_are_refused(key):
    with pytest.raises(UsageError):
        guard.checked_key(key)
    assert guard.checked_key(KEY) == KEY
