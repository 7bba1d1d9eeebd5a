"""What the first of several processes, which has the HTTP server, tells the others: requests, and the end.

mlx-lm hands each request to all processes, which generate for it together. Whether a client has left, only
the first one knows: it then lets the next token be one that ends the answer, which all of them take.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from spqt_cli.decode.parallel import Processes

END = "end"  # in the place of a request


def bare(request: Any) -> Any:
    """A request as another process gets it: without its client, whom nobody sees from there."""
    found = copy.copy(request)
    found.client = SimpleNamespace(left=False)
    found.is_generated = None
    return found


def agreeing(
    sampler: Callable[[mx.array], mx.array],
    processes: Processes,
    end_token: int,
    unwanted: Callable[[], bool],
) -> Callable[[mx.array], mx.array]:
    """A sampler that gives all processes the first one's tokens; that which ends an answer nobody wants."""

    def sample(logprobs: mx.array) -> mx.array:
        tokens = sampler(logprobs)
        return processes.agreed(mx.full(tokens.shape, end_token, tokens.dtype) if unwanted() else tokens)

    return sample
