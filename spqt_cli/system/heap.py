"""Memory as the C library keeps it: what was freed, and the pages that large arrays lie in."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX, ARENAS = -1, -2, -3, -4, -8  # glibc's mallopt
KEEPING = {TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 16 << 20, MMAP_THRESHOLD: 32 << 20, ARENAS: 1}
# What it comes to by itself once large arrays were freed
USUAL = {TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10, MMAP_THRESHOLD: 32 << 20}
# Arrays of any size out of one heap, and what glibc begins with
TOGETHER, APART = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_MAX: 0}, USUAL | {MMAP_MAX: 65536}
LARGE_PAGE = 2 << 20
HUGEPAGE = 14  # Linux's advice to madvise


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
    if not _set(KEEPING):
        yield
        return
    try:
        yield
    finally:
        _set(USUAL)
        trim()


@contextmanager
def in_large_pages(size: int) -> Iterator[None]:
    """In this block put arrays, `size` bytes together, into pages of 2 MB, where Linux and glibc do that.

    For each token all weights are read, and each page is looked up, twice where a virtual machine does it:
    with pages of 4 KB reading took a tenth longer. numpy asks for them for its own arrays.
    """
    if size < LARGE_PAGE or not sys.platform.startswith("linux") or not _set(TOGETHER):
        yield
        return
    try:
        _advise(size)
        yield
    finally:
        _set(APART)
        trim()


def _advise(size: int) -> None:
    """Have the heap's next `size` bytes in large pages. They are taken and given back unused."""
    allocate, free = _call("malloc", ctypes.c_size_t), _call("free", ctypes.c_void_p)
    advise = _call("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if allocate and free and advise and (start := allocate(size)):
        first, last = -(-start // LARGE_PAGE), (start + size) // LARGE_PAGE
        if last > first:
            advise(first * LARGE_PAGE, (last - first) * LARGE_PAGE, HUGEPAGE)
        free(start)


def _set(settings: Mapping[int, int]) -> bool:
    """Whether the C library takes settings of its heap."""
    if (call := _call("mallopt", ctypes.c_int, ctypes.c_int)) is None:
        return False
    taken = [call(name, value) for name, value in settings.items()]
    return all(taken)


@cache
def _call(name: str, *types: Any) -> Callable[..., int] | None:
    try:
        call = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # no such library, call, or way to ask for it
        return None
    call.argtypes = list(types)
    call.restype = ctypes.c_size_t if name == "malloc" else ctypes.c_int
    return call
