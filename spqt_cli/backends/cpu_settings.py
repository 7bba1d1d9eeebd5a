"""The threads and the instruction set of the CPU extension: what was asked for, else what is there."""

import os
from pathlib import Path
from typing import Any

import psutil

from spqt_cli.errors import BackendError, UsageError

ISAS = ("avx512vnni", "avx512", "avx2", "baseline")  # as cpu/kernels.h names them
MOST_THREADS = 512  # a typing error of 100,000 would take all that the system has
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """SPQT_THREADS, else the physical cores that this process may use."""
    if wish := os.environ.get("SPQT_THREADS"):
        count = int(wish) if wish.isdecimal() and len(wish) < 9 else 0
        if not 1 <= count <= MOST_THREADS:
            raise UsageError(
                f"SPQT_THREADS is {wish[:40]!r}", f"set it to a number of threads, 1 to {MOST_THREADS}"
            )
        return count
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(psutil.cpu_count(logical=False) or allowed, allowed)
    if _CGROUP_QUOTA.is_file():  # a container's quota, which affinity does not show
        quota, period = _CGROUP_QUOTA.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def choose_isa(module: Any) -> None:
    """Lets the extension run on the instruction set that SPQT_ISA names; unset, it takes the widest."""
    wish = os.environ.get("SPQT_ISA")
    if not wish:
        return
    if wish not in ISAS:
        raise UsageError(f"SPQT_ISA is {wish[:40]!r}", f"set it to one of {', '.join(ISAS)}")
    if not module.use_isa(wish):
        has = ", ".join(module.isas())
        raise BackendError(f"SPQT_ISA is {wish}, which this machine can't execute", f"set it to one of {has}")
