"""A request that is not served: its status and the JSON that says why, in OpenAI's form."""

import json
from typing import Any

from spqt_cli.errors import BackendError, SpqtError

TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
RETRY = (429, 503)  # what passes by waiting
RETRY_SECONDS = 1


class ClientGone(Exception):
    """The client has closed its connection: nobody is left to answer."""


class Refusal(Exception):
    """An answer other than 200. param: the field of the request that is wrong; code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP wants beside such a status."""
        if self.status in RETRY:
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        """The error object that OpenAI's clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The body as it goes out."""
        return json.dumps(self.body()).encode()


def of(error: BaseException) -> Refusal:
    """The answer to a request that ended in `error`: a user's mistake is 400, the rest 500."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, SpqtError) and not isinstance(error, BackendError):
        return Refusal(400, "; ".join(filter(None, (error.cause, error.hint))))
    said = error.cause if isinstance(error, SpqtError) else f"{type(error).__name__} while generating"
    return Refusal(500, said)
