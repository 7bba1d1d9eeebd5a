"""Whether this process is one of several that run together, by the environment that its launcher gave it.

mlx.launch and mpirun set these variables. Only the standard library is used: MLX is asked only where there
are several.
"""

import json
import os
from pathlib import Path


def rank() -> int:
    """This process's number among those started together; 0 where it is alone."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def size() -> int:
    """How many processes were started together; 1 where this one is alone."""
    for name in ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return max(1, int(os.environ[name]))
    listed = [_count(os.environ[name]) for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES") if name in os.environ]
    return max([1, *listed])


def by_nccl() -> bool:
    """Whether the processes were started to talk through NVIDIA's library."""
    return "NCCL_HOST_IP" in os.environ and "MLX_WORLD_SIZE" in os.environ


def _count(path: str) -> int:
    """The entries of a JSON list in a file: one for each process; 1 where there is none."""
    try:
        found = json.loads(Path(path).read_text() or "[]")
    except (OSError, ValueError):
        return 1
    return len(found) if isinstance(found, list) else 1
