"""The texts that MLX compiles for a GPU kernel: files of `metal/`, their constants and one call of them.

Each file holds ordinary functions. MLX writes the kernel's own head around a body; in Metal only a body can
name positions in the grid and own threadgroup memory. So the body does both and calls the file's function.
"""

import hashlib
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from spqt_cli.backends.gpu import geometry, settings
from spqt_cli.backends.interface import Rotary

Constants = tuple[tuple[str, int | str], ...]  # a str is a type
REDUCE_PARTS = 8  # simdgroups that share the stripes of 32 outputs: short loops, 256 threads
# Threads that an SM is to hold: 64 registers each. Left alone, the compiler takes up to 74 for gate/up, of
# which an SM holds three blocks instead of four; on an H200 that is 4 to 17 % slower (docs/log/kernels.md).
RESIDENT_THREADS = 1024
MOST_BLOCKS = 16  # that any SM since Volta can hold; a larger wish is ignored with a warning
COUNTS = 32  # entries after the partial sums of a stripe: a whole 128-byte line

Then = Literal["", "glu", "residual"] | Rotary  # what a reduction does besides adding up


class Kernel(NamedTuple):
    """What MLX needs to build a kernel.

    files: of `metal/`, in the order in which they are compiled. constants: what the files take for granted.
    memory: the struct that a threadgroup shares, as `memory`; or nothing. call: the rest of the body.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: tuple[str, ...]
    constants: Constants
    memory: str
    call: str
    threads: int
    blocks: int = 0  # that an SM is to hold at least; 0 for RESIDENT_THREADS


def metal(kernel: Kernel) -> tuple[str, str]:
    """The body and the header of a kernel for Metal."""
    return _body(kernel, "threadgroup"), declared(kernel) + "".join(map(body, kernel.files))


def cuda(kernel: Kernel) -> tuple[str, str]:
    """The body and the header of a kernel for CUDA, where files are included by their paths.

    MLX hashes both texts in every launch there; the files' 10 KB would be most of them.
    """
    blocks = kernel.blocks or min(MOST_BLOCKS, max(1, RESIDENT_THREADS // kernel.threads))
    numbers = f"#define SPQT_THREADS {kernel.threads}\n#define SPQT_BLOCKS {blocks}\n"
    head = f"{numbers}{_include('shim_cuda.h')}{declared(kernel)}"
    return _body(kernel, "__shared__"), head + "".join(map(_include, kernel.files))


def names() -> list[str]:
    """The files that hold kernels, and what these include."""
    files = resources.files("spqt_cli.metal").iterdir()
    return sorted(file.name for file in files if file.name.endswith((".metal", ".h")))


@cache
def body(name: str) -> str:
    """The text of a file in `metal/` without comments: MLX copies and compares it in every call."""
    text = resources.files("spqt_cli.metal").joinpath(name).read_text()
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]*//[^\n]*", "", text)).lstrip()


@cache
def _include(name: str) -> str:
    """A line that includes a file of `metal/`, or its text where it has no path that C++ could name."""
    path = str(resources.files("spqt_cli.metal").joinpath(name))
    return f'#include "{path}"\n' if Path(path).is_file() and '"' not in path else body(name)


def _body(kernel: Kernel, shared: str) -> str:
    memory = f"{shared} {kernel.memory} memory;\n" if kernel.memory else ""
    return memory + kernel.call


def declared(kernel: Kernel) -> str:
    """Types, constants and the records of the settings; an enum, as Metal wants variables `constant`."""
    types = "".join(
        f"typedef {value} {name};\n" for name, value in kernel.constants if isinstance(value, str)
    )
    numbers = [f"{name} = {value}" for name, value in kernel.constants if isinstance(value, int)]
    if not kernel.files:
        return types
    return f"{types}enum : int {{ {', '.join(numbers)} }};\n{settings.metal_text()}"


THREAD = """const Thread me = {
  threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, thread_position_in_threadgroup.x,
  thread_index_in_simdgroup, simdgroup_index_in_threadgroup
};
"""
HELPERS = ("lane_order.h", "settings.h")
# Which tile of outputs, and which rows of x: those that share weights are neighbours.
PLACE = """const uint token_tiles = (rows[0] + TOKENS - 1) / TOKENS;
const uint tile = threadgroup_position_in_grid.x / token_tiles;
const uint first_token = threadgroup_position_in_grid.x % token_tiles * TOKENS;
"""
REDUCE_THREADS = 256


@cache
def gemv_kernel(constants: Constants, threads: int, partial: bool) -> Kernel:
    """sparse_gemv.metal with its constants; partial: it writes the partial sums of stripes, not y."""
    constants = (*constants, ("THREADS", threads), ("COUNTS", COUNTS))
    inputs: tuple[str, ...] = ("x", "settings", "packed")
    outputs: tuple[str, ...] = ("partials",)
    call = THREAD + _projection("threadgroup_position_in_grid.x")
    if partial:
        call += "sparse_gemv_stripe(x, settings, packed, partials, projection, memory, me);\n"
    else:
        ys = _names("y", int(dict(constants)["P"]))
        inputs, outputs = (*inputs, "counted"), (*ys, "active")
        # MLX passes arrays of under eight elements in another address space, so counts go by value.
        call += f"device T* y = {_pick(ys)};\nconst uint before = me.index < P ? counted[me.index] : 0;\n"
        call += "sparse_gemv(x, settings, packed, before, y, active, projection, memory, me);\n"
    files = (*HELPERS, "sparse_gemv.metal")
    name = _name("gemv", constants, call)
    return Kernel(name, inputs, outputs, files, constants, "GemvMemory", call, threads)


@cache
def experts_kernel(constants: Constants, threads: int) -> Kernel:
    """sparse_experts.metal with its constants; form: pairs of each row of x, and the number of experts.

    Arrays of under eight elements have another type in Metal: FEW_PAIRS says whether `indices` is one, so
    that either kernel has a name of its own.
    """
    constants = (*constants, ("THREADS", threads), ("COUNTS", COUNTS))
    ys = _names("y", int(dict(constants)["P"]))
    call = THREAD + _projection("threadgroup_position_in_grid.x") + f"device T* y = {_pick(ys)};\n"
    call += "const uint expert = indices[threadgroup_position_in_grid.y];\n"
    call += "const uint each = form[0], experts = form[1];\n"
    call += "sparse_experts(x, settings, packed, expert, each, experts, y, active, projection, memory, me);\n"
    files = (*HELPERS, "sparse_gemv.metal", "sparse_experts.metal")
    name, inputs = _name("experts", constants, call), ("x", "settings", "packed", "indices", "form")
    return Kernel(name, inputs, (*ys, "active"), files, constants, "GemvMemory", call, threads)


@cache
def choose_kernel(constants: Constants, threads: int) -> Kernel:
    """choose_experts.metal with its constants."""
    constants = (*constants, ("THREADS", threads))
    call = THREAD + "choose_experts(logits, indices, weights, memory, me);\n"
    files, name = ("lane_order.h", "choose_experts.metal"), _name("choose", constants, call)
    return Kernel(name, ("logits",), ("indices", "weights"), files, constants, "ChooseMemory", call, threads)


@cache
def add_experts_kernel(constants: Constants, threads: int) -> Kernel:
    """add_experts.metal with its constants; the weights, maybe a small array, are handed over one by one."""
    constants = (*constants, ("THREADS", threads))
    call = THREAD + "ExpertWeights all;\nfor (int i = 0; i < CHOSEN; ++i) all.of[i] = weights[i];\n"
    call += "add_experts(h, y, all, out, me);\n"
    files, name = ("lane_order.h", "add_experts.metal"), _name("add", constants, call)
    return Kernel(name, ("h", "y", "weights"), ("out",), files, constants, "", call, threads)


@cache
def reduce_kernel(constants: Constants, then: Then) -> Kernel:
    """reduce_stripes.metal with its constants, and with what it does besides adding up."""
    shared = ("T", "P", "PER_CHANNEL", "HAS_BIAS", "OUTPUTS", "LANES")
    turn = then if isinstance(then, Rotary) else Rotary(1, 0, traditional=False, rotated=0)
    named = {name: value for name, value in constants if name in shared}
    named |= {"GLU": int(then == "glu"), "RESIDUAL": int(then == "residual"), "ROTATED": turn.rotated}
    named |= {"HEAD": turn.head, "DIMS": turn.dims, "TRADITIONAL": int(turn.traditional)}
    named |= {"PARTS": REDUCE_PARTS, "COUNTS": COUNTS}
    ys = _names("y", 1 if then == "glu" else int(named["P"]))
    more = ("residual",) if then == "residual" else ("turns",) if turn.rotated else ()
    residual = "residual" if then == "residual" else "y"  # read only with RESIDUAL
    turns = "turns" if turn.rotated else "partials"  # read only with ROTATED
    call = THREAD + _projection("threadgroup_position_in_grid.x * 32 / (LANES * OUTPUTS)")
    call += f"device T* y = {_pick(ys)};\n"
    call += f"reduce_stripes(partials, settings, {residual}, {turns}, y, projection, memory, me);\n"
    constants, files = tuple(named.items()), (*HELPERS, "reduce_stripes.metal")
    inputs, outputs = ("partials", "settings", *more), ys
    threads = REDUCE_PARTS * geometry.SIMD
    name = _name("reduce", constants, call)
    return Kernel(name, inputs, outputs, files, constants, "ReduceMemory", call, threads)


@cache
def count_kernel() -> Kernel:
    """count_active.metal: the active channels of a launch that wrote partial sums."""
    before = "me.index < launch_of(settings).projections ? counted[me.index] : 0"
    call = f"{THREAD}count_active(partials, settings, {before}, active, me);\n"
    inputs, files = ("partials", "settings", "counted"), (*HELPERS, "count_active.metal")
    return Kernel("spqt_count", inputs, ("active",), files, (("COUNTS", COUNTS),), "", call, geometry.SIMD)


@cache
def rows_kernel(constants: Constants, threads: int, blocks: int, partial: bool) -> Kernel:
    """sparse_rows.metal with its constants; partial: it writes the partial sums of stripes, not y."""
    constants = (*constants, ("THREADS", threads), ("COUNTS", COUNTS))
    ys = ("partials",) if partial else _names("y", int(dict(constants)["P"]))
    call = THREAD + PLACE + _projection("tile")
    place = "tile, first_token, projection, memory, me"
    if partial:
        call += f"sparse_rows_stripe(x, settings, packed, rows[0], partials, {place});\n"
    else:
        call += f"device T* y = {_pick(ys)};\n"
        call += f"sparse_rows(x, settings, packed, rows[0], y, active, {place});\n"
    outputs = ys if partial else (*ys, "active")
    files = (*HELPERS, "lane_codes.h", "sparse_rows.metal")
    name = _name("rows", constants, call)
    inputs = ("x", "settings", "packed", "rows")
    return Kernel(name, inputs, outputs, files, constants, "RowsMemory", call, threads, blocks)


@cache
def matrix_kernel(name: str, constants: Constants, threads: int, blocks: int, partial: bool) -> Kernel:
    """matrix_rows.metal or gemm_rows.metal by `name`; of one projection, so that few kernels are compiled."""
    constants = (*constants, ("THREADS", threads), ("COUNTS", COUNTS))
    place = "tile, first_token, memory, me"
    if partial:
        call = f"{name}_rows_stripe(x, settings, packed, rows[0], partials, {place});\n"
    else:
        call = f"{name}_rows(x, settings, packed, rows[0], y_0, active, {place});\n"
    call = THREAD + PLACE + call
    return Kernel(
        _name(name, constants, call),
        ("x", "settings", "packed", "rows"),
        ("partials",) if partial else ("y_0", "active"),
        (*HELPERS, "lane_codes.h", "rows_of_x.h", f"{name}_rows.metal"),
        constants,
        f"{name.title()}Memory",
        call,
        threads,
        blocks,
    )


@cache
def reduce_rows_kernel(constants: Constants, tile: int) -> Kernel:
    """reduce_rows.metal with its constants."""
    named = {name: value for name, value in constants if name in ("T", "P", "PER_CHANNEL", "HAS_BIAS")}
    named |= {"TILE": tile, "COUNTS": COUNTS, "THREADS": REDUCE_THREADS}
    ys = _names("y", int(named["P"]))
    call = THREAD + _projection(f"(me.threadgroup_x * {REDUCE_THREADS} + me.index) / {tile}")
    call += f"device T* y = {_pick(ys)};\n"
    call += "reduce_rows(partials, settings, rows[0], y, active, projection, me);\n"
    constants, files = tuple(named.items()), (*HELPERS, "reduce_rows.metal")
    name = _name("reduce_rows", constants, call)
    inputs, outputs = ("partials", "settings", "rows"), (*ys, "active")
    return Kernel(name, inputs, outputs, files, constants, "", call, REDUCE_THREADS)


@cache
def dequantize_kernel(constants: Constants, threads: int) -> Kernel:
    """dequantize.metal with its constants."""
    constants = (*constants, ("THREADS", threads), ("COUNTS", COUNTS))
    call = f"{THREAD}dequantize(settings, packed, w, me);\n"
    files = (*HELPERS, "lane_codes.h", "dequantize.metal")
    name = _name("dequantize", constants, call)
    return Kernel(name, ("settings", "packed"), ("w",), files, constants, "", call, threads)


def _projection(tile: str) -> str:
    return f"const uint projection = projection_of({tile}, settings, P);\n"


def _names(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{p}" for p in range(count))


def _pick(arrays: tuple[str, ...]) -> str:
    """A projection's own of these arrays: MLX gives each a parameter of its own."""
    chain = arrays[-1]
    for p in reversed(range(len(arrays) - 1)):
        chain = f"projection == {p} ? {arrays[p]} : {chain}"
    return chain


def _name(kind: str, constants: Constants, call: str) -> str:
    """A short name of a kernel with these constants: MLX looks it up by it in every launch."""
    digest = hashlib.sha256(repr((sorted(constants), call)).encode()).hexdigest()
    return f"spqt_{kind}_{dict(constants).get('P', 1)}_{digest[:8]}"
