"""Memory that was freed, which the C library keeps for later."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENAS = -1, -2, -3, -8  # glibc's mallopt
KEEPING = {TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 16 << 20, MMAP_THRESHOLD: 32 << 20, ARENAS: 1}
# What it comes to by itself once large arrays were freed
USUAL = {TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10, MMAP_THRESHOLD: 32 << 20}


def trim() -> None:
    """Give freed memory back to the system where the C library has a call for it, as glibc; else do nothing.

    glibc takes arrays of up to 32 MB out of one heap and keeps what is freed within it: 80 of 1,070 MB at the
    peak of a fit.
    """
    if (call := _call("malloc_trim", ctypes.c_size_t)) is not None:
        call(0)


@contextmanager
def kept() -> Iterator[None]:
    """In this block keep what is freed where the C library is glibc; `trim` still gives it back.

    New threads share the main heap, from then on: heaps of their own are too small to keep much in.

    With arrays of a few MB that come and go, a tenth of the time was the system's, for pages of zeros.
    """
    if (call := _call("mallopt", ctypes.c_int, ctypes.c_int)) is None:
        yield
        return
    for name, value in KEEPING.items():
        call(name, value)
    try:
        yield
    finally:
        for name, value in USUAL.items():
            call(name, value)
        trim()


@cache
def _call(name: str, *types: Any) -> Callable[..., int] | None:
    try:
        call = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # no such library, call, or way to ask for it
        return None
    call.argtypes = list(types)
    call.restype = ctypes.c_int
    return call
