"""The texts of the GPU kernels: bodies from `metal/`, with their constants and OWN_Y, the output array of a
threadgroup's own projection. It knows no arrays.
"""

import hashlib
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from spqt_cli.backends.gpu import geometry
from spqt_cli.backends.interface import Rotary

Constants = tuple[tuple[str, int | str], ...]
REDUCE_PARTS = 8  # simdgroups that share the stripes of 32 outputs: short loops, 256 threads
COUNTS = 32  # entries after the partial sums of a stripe: a whole 128-byte line


Then = Literal["", "glu", "residual"] | Rotary  # what a reduction does besides adding up


class Kernel(NamedTuple):
    """What MLX needs to build a kernel. Its template integers are constants in the text."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    threads: int


def header() -> str:
    """The helper functions of the bodies."""
    return body("lane_order.h") + body("settings.h")


@cache
def body(name: str) -> str:
    """The text of a file in `metal/` without comments: MLX copies and hashes it in every call."""
    text = resources.files("spqt_cli.metal").joinpath(name).read_text()
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]*//[^\n]*", "", text)).lstrip()


def cuda(kernel: Kernel) -> tuple[str, str]:
    """The text and the header of a kernel for CUDA, where the bodies are included by their paths.

    MLX hashes the text of a CUDA kernel in every launch; the bodies' 10 KB are most of it.
    """
    source, head = kernel.source, f"#define SPQT_THREADS {kernel.threads}\n"
    for name in ("sparse_gemv.metal", "reduce_stripes.metal", "count_active.metal"):
        source = source.replace(body(name), _include(name))
    return source, head + "".join(map(_include, ("shim_cuda.h", "lane_order.h", "settings.h")))


@cache
def _include(name: str) -> str:
    """A line that includes a file of `metal/`, or its text where it has no path that C++ could name."""
    path = str(resources.files("spqt_cli.metal").joinpath(name))
    return f'#include "{path}"\n' if Path(path).is_file() and '"' not in path else body(name)


@cache
def gemv_kernel(constants: Constants, threads: int) -> Kernel:
    """sparse_gemv.metal with its constants; with PARTIAL it writes partial sums, not y."""
    named = dict(constants)
    count, partial = int(named["P"]), "PARTIAL" in named
    lines = _declared({**named, "Y": "float" if partial else named["T"], "THREADS": threads})
    lines += [
        f"constexpr int PARTIAL = {int(partial)};" if not partial else "",
        f"constexpr int COUNTS = {COUNTS if partial else 'P'};",
    ]
    if partial:
        lines += [
            "device float* stripe_partials = partials + ulong(threadgroup_position_in_grid.y) * settings[2];",
            "#define OWN_Y stripe_partials + threadgroup_position_in_grid.x * (LANES * OUTPUTS)",
            f"device uint32_t* counts = (device uint32_t*)(stripe_partials + settings[2] - {COUNTS});",
            "const uint counted_before = 0;",
        ]
    else:
        thread = "thread_position_in_threadgroup.x"
        lines += [
            f"#define OWN_Y {_pick('y', count)}",
            "device uint32_t* counts = active;",
            f"const uint counted_before = {thread} < {count} ? counted[{thread}] : 0;",
        ]
    ys = ["partials"] if partial else [*(f"y_{p}" for p in range(count)), "active"]
    return Kernel(
        _name("gemv", named),
        ("x", "settings", "packed", *(() if partial else ("counted",))),
        tuple(ys),
        "\n".join(filter(None, lines)) + "\n" + body("sparse_gemv.metal"),
        threads,
    )


@cache
def reduce_kernel(constants: Constants, then: Then) -> Kernel:
    """reduce_stripes.metal with its constants, and with what it does besides adding up."""
    named = {k: v for k, v in constants if k in ("T", "P", "PER_CHANNEL", "HAS_BIAS", "OUTPUTS", "LANES")}
    turn = then if isinstance(then, Rotary) else Rotary(1, 0, traditional=False, rotated=0)
    named |= {"GLU": int(then == "glu"), "RESIDUAL": int(then == "residual"), "ROTATED": turn.rotated}
    named |= {"HEAD": turn.head, "DIMS": turn.dims, "TRADITIONAL": int(turn.traditional)}
    count = int(named["P"])
    results = 1 if then == "glu" else count
    more = ["residual"] if then == "residual" else ["turns"] if turn.rotated else []
    lines = [
        *_declared({**named, "Y": named["T"], "PARTS": REDUCE_PARTS}),
        f"#define OWN_Y {_pick('y', results)}",
        "" if "residual" in more else "const device Y* residual = y_0;",
        "" if "turns" in more else "const device float* turns = partials;",
    ]
    return Kernel(
        _name("reduce", named),
        ("partials", "settings", *more),
        tuple(f"y_{p}" for p in range(results)),
        "\n".join(filter(None, lines)) + "\n" + body("reduce_stripes.metal"),
        REDUCE_PARTS * geometry.SIMD,
    )


@cache
def count_kernel() -> Kernel:
    """count_active.metal: the active channels of a launch that wrote partial sums."""
    text = body("count_active.metal")
    return Kernel("spqt_count", ("partials", "settings", "counted"), ("active",), text, geometry.SIMD)


def _declared(named: dict[str, int | str]) -> list[str]:
    """Lines that declare types and constants; few, because MLX hashes the text in every launch."""
    types = [f"typedef {value} {name};" for name, value in named.items() if isinstance(value, str)]
    numbers = [f"{name} = {value}" for name, value in named.items() if isinstance(value, int)]
    return [*types, f"constexpr int {', '.join(numbers)};"]


def _name(kernel: str, named: dict[str, int | str]) -> str:
    """A short name of a kernel with these constants: MLX looks it up by it in every launch."""
    digest = hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest()
    return f"spqt_{kernel}_{named['P']}_{digest[:8]}"


def _pick(name: str, count: int) -> str:
    """A projection's own of the arrays `name`_0, ...; the body says which projection it is."""
    chain = f"{name}_{count - 1}"
    for p in reversed(range(count - 1)):
        chain = f"projection == {p} ? {name}_{p} : {chain}"
    return chain
