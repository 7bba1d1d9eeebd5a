"""Memory that was freed, which the C library keeps for later."""

import ctypes
from collections.abc import Callable
from functools import cache


def trim() -> None:
    """Give freed memory back to the system where the C library has a call for it, as glibc; else do nothing.

    glibc takes arrays of up to 32 MB out of one heap and keeps what is freed within it: 80 of 1,070 MB at the
    peak of a fit.
    """
    if (call := _malloc_trim()) is not None:
        call(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        call = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no such library, call, or way to ask for it
        return None
    call.argtypes = [ctypes.c_size_t]
    call.restype = ctypes.c_int
    return call
