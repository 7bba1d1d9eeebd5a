"""Whether the tokens that a model is fed are a prompt's or were generated: the latter run sparse.

The caller says which; shapes don't tell, since a prompt may be one token and a decode step many rows. It
holds for the thread or task that said it, while a step's graph is built, and knows neither models nor layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_decoding: ContextVar[bool] = ContextVar("spqt_decoding", default=False)

decodes = _decoding.get  # () -> bool; bound as it is: layers ask some 200 times a token


@contextmanager
def decoding() -> Iterator[None]:
    """Layers skip channels in this block, each row by its own mask: the tokens fed here were generated.

    mlx-lm's own loops say it by themselves (hooks_generate.py); a loop of your own says it around each call
    of the model, and never around a `yield`. Where nobody says it, as in a prompt, all channels are used.
    Within `mx.compile` what holds while tracing holds for every later call.
    """
    before = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(before)


@contextmanager
def prompting() -> Iterator[None]:
    """All channels are used in this block, also within `decoding`."""
    before = _decoding.set(False)
    try:
        yield
    finally:
        _decoding.reset(before)
