"""Who may ask: the Host and Origin of a request, and its key. Knows headers, not bodies."""

import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from email.message import Message

from spqt_cli.errors import UsageError
from spqt_cli.serve.refusal import Refusal

HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
ORIGIN = re.compile(r"https?://(?P<host>[^/?#@\s]+)")
SHORTEST_KEY = 16
OPEN_PATHS = ("/health",)  # without a key: whoever looks after the process asks here


@dataclass(frozen=True)
class Guard:
    """The rules. hosts: names the server goes by beside loopback ones; origins: of web pages that may ask,
    "*" for all; key: "" where none is needed.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    key: str = field(default="", repr=False)

    def check(self, method: str, path: str, headers: Message, address: str) -> None:
        """Raise Refusal for a request that may not ask. address: of ours, that the client connected to.

        A page of another site that a browser shows can send requests here, under a name of its own that it
        makes lead to loopback: so Host and Origin are checked even where no key is needed.
        """
        hosts = headers.get_all("Host") or []
        if len(hosts) != 1:
            raise Refusal(400, "one Host header is needed")
        if not self._is_ours(hosts[0], address):
            raise Refusal(403, f"{hosts[0][:100]!r} is no name of this server; --allowed-hosts adds names")
        for origin in headers.get_all("Origin") or []:
            if not self._may_ask(origin, address):
                said = f"pages of {origin[:100]!r} may not ask here; --allowed-origins adds some"
                raise Refusal(403, said)
        if self.key and method != "OPTIONS" and path not in OPEN_PATHS:
            scheme, _, given = headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                given = ""
            if not hmac.compare_digest(given.encode("utf-8", "replace"), self.key.encode()):
                raise Refusal(401, "a valid API key is needed", code="invalid_api_key")

    def _is_ours(self, host: str, address: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].lower().strip("[]").removesuffix(".")
        return name in ("localhost", address) or name in self.hosts or is_loopback(name)

    def _may_ask(self, origin: str, address: str) -> bool:
        if "*" in self.origins or origin in self.origins:
            return True
        found = ORIGIN.fullmatch(origin)
        return found is not None and self._is_ours(found["host"], address)


def is_loopback(address: str) -> bool:
    """Whether an address in digits is this machine's own."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def checked_key(key: str) -> str:
    """A key that can be sent in a header and not be guessed. Raises UsageError for others."""
    if not key.isascii() or not key.isprintable() or " " in key or len(key) < SHORTEST_KEY:
        raise UsageError(
            f"the API key must be at least {SHORTEST_KEY} printable ASCII characters without spaces",
            "make one: openssl rand -hex 32",
        )
    return key
