"""What a benchmark ran on: device, versions, commit, copy bandwidth, energy.

It knows nothing of models. Every figure is None where the platform does not tell it.
"""

import contextlib
import ctypes
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends import select
from spqt_cli.decode import profile
from spqt_cli.version import __version__

COPY_BYTES = {"gpu": 1 << 30, "cpu": 1 << 28}  # far larger than any cache
COPY_SAMPLES = 7
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def describe(commit: str | None = None) -> dict[str, Any]:
    """Device, versions and commit, as printed with every result. commit: where git can't tell it."""
    backend = select.backend()
    return {
        "device": profile.chip(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
        "backend": backend.name,
        "backend_reason": backend.reason,
        "mlx": _version("mlx"),
        "mlx_lm": _version("mlx-lm"),
        "spqt": __version__,
        "commit": commit or _commit(),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(mx, "__version__", "unknown")) if package == "mlx" else "unknown"


def _commit() -> str:
    """`git describe` of the checkout the package runs from, else the version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
    return f"v{__version__}"


def copy_bandwidth() -> float:
    """Bytes per second that the device reads and writes in a plain copy: the median of several.

    On a GPU by one elementwise operation of MLX; on a CPU by numpy on all cores, since MLX uses one.
    """
    sample = _gpu_copy() if mx.default_device().type == mx.DeviceType.gpu else _cpu_copy()
    return statistics.median(sample)


def _gpu_copy() -> list[float]:
    words = COPY_BYTES["gpu"] // 4
    source = mx.zeros(words, mx.int32)
    mx.eval(source)
    rates = []
    for at in range(COPY_SAMPLES + 1):
        start = time.perf_counter()
        mx.eval(source + at)
        rates.append(2 * 4 * words / (time.perf_counter() - start))
    mx.clear_cache()
    return rates[1:]  # the first one compiles and allocates


def _cpu_copy() -> list[float]:
    threads = os.cpu_count() or 1
    size = COPY_BYTES["cpu"] // threads
    pairs = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_SAMPLES + 1):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            rates.append(2 * size * threads / (time.perf_counter() - start))
    return rates[1:]


class Energy:
    """Joules since the machine started, where it tells without root: NVIDIA's counter, or RAPL."""

    def __init__(self) -> None:
        self.source = "n/a: the platform does not tell it without root"
        self._nvml: Any = None
        self._handle = ctypes.c_void_p()
        if mx.default_device().type == mx.DeviceType.gpu and platform.system() == "Linux":
            self._open_nvml()
        elif os.access(RAPL, os.R_OK):
            self.source = "RAPL, processor package"

    def _open_nvml(self) -> None:
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        index = ctypes.c_uint(int(first) if first.isdigit() else 0)
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle)):
            return
        self._nvml = nvml
        if self.joules() is None:
            self._nvml = None
            return
        self.source = "NVML, whole board"

    def joules(self) -> float | None:
        """The counter's value now; differences mean something, not the value."""
        if self._nvml is not None:
            millijoules = ctypes.c_ulonglong()
            failed = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
            return None if failed else millijoules.value / 1e3
        if self.source.startswith("RAPL"):
            return int(RAPL.read_text()) / 1e6
        return None
