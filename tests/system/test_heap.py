"""Freed memory goes back to the system where the C library can give it, and nothing fails elsewhere."""

import ctypes

import psutil
import pytest

from spqt_cli.system import heap


@pytest.fixture(autouse=True)
def asked_anew():
    heap._malloc_trim.cache_clear()
    yield
    heap._malloc_trim.cache_clear()


@pytest.mark.skipif(heap._malloc_trim() is None, reason="this C library has no malloc_trim")
def test_freed_memory_is_given_back():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(100_000) for _ in range(500)]  # 50 MB, from the heap: mapped alone above 128 KB
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:  # the last one keeps the heap from ending before it
        library.free(block)
    before = psutil.Process().memory_info().rss
    heap.trim()
    library.free(blocks[-1])
    assert before - psutil.Process().memory_info().rss > 30e6


def test_a_c_library_without_the_call(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.trim()
