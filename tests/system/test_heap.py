"""Freed memory goes back to the system, or is kept, where the C library can; nothing fails elsewhere."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from spqt_cli.system import heap


@pytest.fixture(autouse=True)
def asked_anew():
    heap._call.cache_clear()
    yield
    heap._call.cache_clear()


IS_GLIBC = heap._call("malloc_trim", ctypes.c_size_t) is not None
FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # pages of 4 KB, whatever this machine makes of large arrays
import numpy as np
from spqt_cli.system import heap

def faults():
    def some(count):
        for _ in range(count):
            arrays = [np.ones(1 << 20, np.float32) for _ in range(8)]
            del arrays
    some(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    some(20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
with heap.kept():
    kept = faults()
print(usual, kept, faults())
"""


@pytest.mark.skipif(not IS_GLIBC, reason="this C library has no mallopt")
def test_memory_that_is_kept_is_not_asked_for_again():
    command = [sys.executable, "-c", FAULTS]
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, kept, after = map(int, said.split())
    pages = 20 * 8 * 1024  # of 4 KB
    assert before > pages / 4
    assert kept < pages / 100
    assert after < pages / 4  # 32 MB at the heap's end are less than is given back from then on


@pytest.mark.skipif(not IS_GLIBC, reason="this C library has no malloc_trim")
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


LARGE = """
import mlx.core as mx
from spqt_cli.system import heap

mx.set_default_device(mx.cpu)
SIZES = 40 << 20, 3 << 20, 21 << 20  # bytes: mapped alone, and of the heap

def held(name):
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

def arrays():
    found = [mx.ones(size // 4) for size in SIZES]
    mx.eval(found)
    return found

before = held("AnonHugePages")
usual = arrays()
plain = held("AnonHugePages")
with heap.in_large_pages(sum(SIZES)):
    ours = arrays()
large = held("AnonHugePages")
right = all(mx.array_equal(one, mx.ones(one.size)).item() for one in ours)
del usual, ours
heap.trim()
one = mx.ones(64 << 18)
mx.eval(one)
full = held("Rss")
del one
mx.clear_cache()
print(sum(SIZES), plain - before, large - plain, right, full - held("Rss"))
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not (IS_GLIBC and THP.exists() and "[madvise]" in THP.read_text()), reason="no large pages on demand here"
)
def test_arrays_in_large_pages():
    command = [sys.executable, "-c", LARGE]
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    size, usual, large, right, given_back = said.split()
    assert int(usual) == 0
    assert int(large) > 0.8 * int(size)
    assert right == "True"
    assert int(given_back) > 60e6  # large arrays are mapped alone again


def test_a_c_library_without_the_call(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.trim()
    with heap.kept(), heap.in_large_pages(1 << 30):
        pass


def test_memory_that_cant_be_had_is_none_in_large_pages():
    heap._advise(1 << 62)
