"""mlx-lm's request handler behind a door: who asks, how much and how fast is settled before mlx-lm reads.

A body that passes is handed to mlx-lm's own `do_POST` as it was checked. What mlx-lm answers with an error
status becomes a Refusal, so that every error has one form.
"""

import functools
import io
import json
import logging
import re
import sys
import urllib.parse
from email.message import Message
from typing import Any

from mlx_lm.server import APIHandler

from spqt_cli.errors import SpqtError
from spqt_cli.serve import fields, refusal
from spqt_cli.serve.connection import BoundedReader, Client, has_more, linger
from spqt_cli.serve.metrics import CONTENT_TYPE
from spqt_cli.serve.refusal import ClientGone, Refusal
from spqt_cli.system.terminal import harmless

HEADER_BYTES = 64 << 10
WRITE_SECONDS = 30.0  # for one write: a client that does not read is left
LINGER_SECONDS = 2.0
DIGITS = re.compile(r"[0-9]{1,15}")
GET_PATHS = ("/health", "/metrics", "/v1/models")

_log = logging.getLogger("spqt")


class Handler(APIHandler):
    """One request, one answer, one connection."""

    server: Any  # a serve.server.Server
    _headers_buffer: list[bytes]
    server_version, sys_version = "spqt", ""

    def setup(self) -> None:
        super().setup()
        self.reader = BoundedReader(self.connection, self.server.limits.read_seconds, HEADER_BYTES)
        self.rfile = io.BufferedReader(self.reader)
        self.headers, self.close_connection = Message(), True
        self.requestline = self.command = self.path = ""
        self.request_version = self.default_request_version
        self.status: int | str = "closed"
        self.has_begun = self.was_read = False

    def finish(self) -> None:
        super().finish()
        if not self.was_read or has_more(self.connection):
            linger(self.connection, LINGER_SECONDS)

    def handle_one_request(self) -> None:
        """Answer, whatever happens; then count it."""
        try:
            super().handle_one_request()
        except (ClientGone, OSError):
            self.status = "closed"
        except Exception as error:
            refused = refusal.of(error)
            if refused.status == 500:
                _log.exception("a request failed")
            self._refuse(refused)
        finally:
            known = (*GET_PATHS, *fields.ROUTES)
            self.server.metrics.request(self.path if self.path in known else "other", self.status)

    def parse_request(self) -> bool:
        """As the base; then whether they may ask, whatever they ask."""
        if not super().parse_request():
            return False
        if self.request_version == "HTTP/0.9":
            raise Refusal(400, "send HTTP/1.0 or 1.1")
        ours = self.connection.getsockname()[0]
        self.server.guard.check(self.command, self.path, self.headers, ours.partition("%")[0])
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base's own refusals, of what is no HTTP: in our form, and as the client's mistakes."""
        code = {501: 405, 505: 400}.get(code, code)
        raise Refusal(code, message or "this is no request that can be served")

    def _refuse(self, refused: Refusal) -> None:
        """Say why, as far as that is still possible."""
        try:
            if self.has_begun:  # a stream: its status has been sent
                self.wfile.write(b"data: " + refused.encoded() + b"\n\n")
                return
            self.request_version, self._headers_buffer = "HTTP/1.0", []
            self.connection.settimeout(WRITE_SECONDS)
            self._reply(refused.encoded(), status=refused.status, headers=refused.headers)
        except OSError:
            self.status = "closed"

    def _reply(
        self,
        body: bytes,
        kind: str = "application/json",
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)

    def send_response(self, code: int, message: str | None = None) -> None:
        self.status = code
        super().send_response(code, message)

    def end_headers(self) -> None:
        super().end_headers()
        self.has_begun = True

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """mlx-lm begins each of its answers here, those to an exception as well."""
        if status_code < 400:
            super()._set_completion_headers(status_code)
            return
        error = sys.exception()
        if isinstance(error, (Refusal, SpqtError, ClientGone)):
            raise error
        if error is not None and status_code == 404:  # its answer to whatever failed while generating
            raise refusal.of(error)
        raise Refusal(status_code, str(error or "this can't be served"))

    def _set_cors_headers(self) -> None:
        """For pages that may ask: the others were refused."""
        if origin := self.headers.get("Origin"):
            anyone = "*" in self.server.guard.origins
            self.send_header("Access-Control-Allow-Origin", "*" if anyone else origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            asked = self.headers.get("Access-Control-Request-Headers", "")
            allowed = (
                asked if re.fullmatch(r"[A-Za-z0-9, -]{1,1000}", asked) else "Authorization, Content-Type"
            )
            self.send_header("Access-Control-Allow-Headers", allowed)

    def _has_read(self) -> None:
        """The request is here: the connection is not idle any more."""
        self.was_read = True
        self.server.reading.pop(self.connection, None)

    def do_GET(self) -> None:
        self._has_read()
        if self.path in fields.ROUTES:
            raise Refusal(405, "send a POST request")
        if self.path == "/health":
            self._check_health()
            self._reply(b'{"status": "ok"}')
        elif self.path == "/metrics":
            self._reply(self.server.metrics_text().encode(), CONTENT_TYPE)
        elif self.path == "/v1/models" or self.path.startswith("/v1/models/"):
            self.handle_models_request()
        else:
            raise Refusal(404, "there is nothing at this path")

    def handle_models_request(self) -> None:
        """The one model that is served."""
        served = self.server.served
        model = {"id": served.name, "object": "model", "created": self.server.created, "owned_by": "spqt"}
        name = urllib.parse.unquote(self.path.removeprefix("/v1/models").removeprefix("/"))
        if not name:
            model = {"object": "list", "data": [model]}
        elif name not in (served.name, *served.aliases):
            said = f"the model {name[:100]!r} is not served here"
            raise Refusal(404, said, "model", "model_not_found")
        self._reply(json.dumps(model).encode())

    def do_POST(self) -> None:
        if self.path not in fields.ROUTES:
            known = self.path in GET_PATHS
            raise Refusal(405 if known else 404, "send GET" if known else "there is nothing at this path")
        self._check_health()
        body = json.dumps(fields.checked(self._body(), self.path, self.server.served)).encode()
        self.headers.replace_header("Content-Length", str(len(body)))
        self.rfile = io.BytesIO(body)
        self.connection.settimeout(WRITE_SECONDS)
        super().do_POST()

    def _check_health(self) -> None:
        if not self.response_generator.is_healthy:
            raise Refusal(503, self.server.unhealthy(), code="unavailable")

    def _body(self) -> bytes:
        """Raises Refusal: 411, 400, 413 before anything is read; then 408, or 400 for a body cut short."""
        lengths = self.headers.get_all("Content-Length") or []
        if not lengths or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "a Content-Length header is needed, and no Transfer-Encoding")
        if len(set(lengths)) > 1 or not DIGITS.fullmatch(lengths[0]):
            raise Refusal(400, "Content-Length is no number")
        length, most = int(lengths[0]), self.server.limits.body_bytes
        if length > most:
            raise Refusal(413, f"the body is larger than {most} bytes")
        self.reader.left = max(length, 1)
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refusal(400, "the body is shorter than Content-Length says")
        self._has_read()
        return data

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """One's turn, then mlx-lm's."""
        request.client = Client(self.connection)

        def check() -> None:
            request.client.check()
            self._check_health()

        with self.server.admission.slot(check) as request.is_generated:
            try:
                super().handle_completion(request, stop_words)
            finally:
                request.client.left = True  # what is still under way for it ends

    def log_message(self, format: str, *args: Any) -> None:
        _log.info("%s %s", self.client_address[0], harmless(format % args))


def factory(generator: Any, fingerprint: str) -> Any:
    """What makes a Handler for a connection."""
    return functools.partial(Handler, generator, system_fingerprint=fingerprint)
