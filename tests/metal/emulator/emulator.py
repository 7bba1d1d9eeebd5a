"""Emulates one launch of a kernel, from the whole Metal text that MLX would compile.

The text comes from `mx.export_function`, which prints it on any machine. g++ compiles it with
shim_cpu.h; runtime.cpp runs its lanes, books.h looks at every access.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from spqt_cli.backends.gpu import kernel_text

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]


class Traffic(NamedTuple):
    lines: int  # distinct 128-byte lines read
    lines_summed: int  # the sum over threadgroups of those distinct within each
    written_bytes: int


class Emulation(NamedTuple):
    outputs: list[mx.array]
    reports: list[str]  # every fault seen
    traffic: dict[str, Traffic]  # per buffer


def metal_text(launch, inputs: Sequence[mx.array]) -> str:
    """The Metal that MLX would compile for this launch, as it prints it."""
    source, header = kernel_text.metal(launch.kernel)
    return _printed(
        launch.kernel,
        (source, header),
        launch.threadgroups,
        tuple((tuple(shape), dtype) for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)),
        tuple((array.shape, array.dtype) for array in inputs),
    )


@lru_cache(maxsize=4096)
def _printed(kernel, texts, threadgroups, outputs, inputs) -> str:
    source, header = texts
    metal = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source,
        header=header,
    )

    def call(*arrays):
        return metal(
            inputs=list(arrays),
            grid=(threadgroups[0] * kernel.threads, threadgroups[1], 1),
            threadgroup=(kernel.threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            verbose=True,
            stream=mx.gpu,
        )

    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed"
        with printed.open("w") as sink:  # MLX prints from C++, below sys.stdout
            saved = os.dup(1)
            os.dup2(sink.fileno(), 1)
            try:
                mx.export_function(str(Path(folder) / "f"), call, *(mx.zeros(*one) for one in inputs))
            finally:
                os.dup2(saved, 1)
                os.close(saved)
        return printed.read_text().split("```")[1]


def clang_text(text: str) -> str:
    """The same text for clang, where a variable of an address space can't be automatic or constructed."""
    return re.sub(r"\bthreadgroup (\w+ \w+(\[.*?\])?;)", r"extern threadgroup \1", text)


def emulate(launch, inputs: Sequence[mx.array]) -> Emulation:
    """Runs a launch: its outputs, the faults seen and the traffic per buffer."""
    mx.eval(list(inputs))
    text = metal_text(launch, inputs)
    runtime = _runtime()
    entry = ctypes.CDLL(str(_compiled(_cpu_source(text)))).entry
    runtime.emulator_reset()
    for name, array in zip(launch.kernel.inputs, inputs, strict=True):
        data = _bytes(array)
        at = runtime.emulator_buffer(name.encode(), len(data), 0)
        ctypes.memmove(at, data, len(data))
    addresses = []
    for name, shape, dtype in zip(launch.kernel.outputs, launch.shapes, launch.dtypes, strict=True):
        size = int(np.prod(shape)) * dtype.size
        addresses.append((runtime.emulator_buffer(name.encode(), size, 1), size))
    runtime.emulator_run(entry, *launch.threadgroups, launch.kernel.threads)
    reports = [runtime.emulator_report(i).decode() for i in range(runtime.emulator_reports())]
    outputs = [
        _array(ctypes.string_at(at, size), shape, dtype)
        for (at, size), shape, dtype in zip(addresses, launch.shapes, launch.dtypes, strict=True)
    ]
    names = [*launch.kernel.inputs, *launch.kernel.outputs]
    counts = [Traffic(*(runtime.emulator_traffic(i, what) for what in range(3))) for i in range(len(names))]
    return Emulation(outputs, reports, dict(zip(names, counts, strict=True)))


def _cpu_source(text: str) -> str:
    """The same text with threadgroup arrays checked, and an entry that calls the kernel."""
    text = re.sub(r"\bthreadgroup\s+(\w+)\s+(\w+)\[(.*?)\];", r"static Threadgroup<\1, (\3)> \2;", text)
    text = re.sub(r"\bthreadgroup (\w+) (\w+);", r"static \1 \2;", text)
    text = re.sub(r"struct \w+Memory \{.*?\};", _checked_arrays, text, flags=re.S)
    head = re.search(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{", text, re.S)
    arguments = []
    for parameter in head[2].split(",\n"):
        kind, name, mark = re.fullmatch(r"\s*(.*?)\s*(\w+) \[\[(.*)\]\]", parameter, re.S).groups()
        if buffer := re.fullmatch(r"buffer\((\d+)\)", mark):
            arguments.append(f"({kind})buffers[{buffer[1]}]")
        else:
            arguments.append(f"emulator_lane()->{name}")
    call = f"{head[1]}({', '.join(arguments)});"
    return (
        f'#include "{HERE}/shim_cpu.h"\nextern "C" const Lane* emulator_lane();\n{text}\n'
        f'extern "C" void entry(void** buffers) {{ {call} }}\n'
    )


def _checked_arrays(memory: re.Match[str]) -> str:
    """The struct of a threadgroup's arrays, each of them checked."""
    return re.sub(r"(\w+) (\w+)\[(.*?)\];", r"Threadgroup<\1, (\3)> \2;", memory[0])


@cache
def _folder() -> Path:
    """Where compiled kernels stay: for this process, else where conftest.py or a person says."""
    given = os.environ.get("SPQT_EMULATOR_CACHE")
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        return Path(given)
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="spqt-emulator-")


def _compiled(
    source: str,
    flags: Sequence[str] = ("-fsanitize=thread",),
    libraries: Sequence[str] = ("-nostdlib", "-lgcc"),
) -> Path:
    key = hashlib.sha256((source + (HERE / "shim_cpu.h").read_text() + str(flags)).encode()).hexdigest()[:24]
    library = _folder() / f"{key}.so"
    if not library.exists():
        unit = library.with_suffix(f".{os.getpid()}.cpp")  # other processes may compile the same
        unit.write_text(source)
        fresh = library.with_suffix(f".{os.getpid()}")
        compiled = library.with_suffix(f".{os.getpid()}.o")
        # Linked without -fsanitize: its calls must reach books.h, not g++'s own library.
        for command in (
            ["g++", *FLAGS, *flags, "-c", "-o", str(compiled), str(unit)],
            ["g++", "-shared", "-o", str(fresh), str(compiled), *libraries],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ refused the kernel:\n{done.stderr[:4000]}")
        compiled.unlink()
        unit.rename(library.with_suffix(".cpp"))
        fresh.rename(library)
    return library


@cache
def _runtime() -> ctypes.CDLL:
    texts = [(HERE / name).read_bytes() for name in ("runtime.cpp", "books.h")]
    version = hashlib.sha256(b"".join(texts)).hexdigest()
    source = f'#include "{HERE}/runtime.cpp"\n// {version}\n'
    runtime = ctypes.CDLL(str(_compiled(source, ("-O2", f"-I{HERE}"), ())), mode=ctypes.RTLD_GLOBAL)
    runtime.emulator_buffer.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int]
    runtime.emulator_buffer.restype = ctypes.c_void_p
    runtime.emulator_report.restype = ctypes.c_char_p
    runtime.emulator_traffic.restype = ctypes.c_uint64
    return runtime


def _bytes(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array)).tobytes()


def _array(data: bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    kinds = {
        mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32, mx.uint32: np.uint32,
        mx.uint8: np.uint8,
    }  # fmt: skip
    array = mx.array(np.frombuffer(data, dtype=kinds[dtype]).reshape(shape).copy())
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
