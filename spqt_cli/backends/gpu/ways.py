"""Which way many rows are multiplied on this GPU: timed once on a matrix like the layer's, and remembered.

few         sparse_rows.metal, each row over its own channels
matrix      matrix_rows.metal, by CUDA's matrix unit
quantized   mx.quantized_matmul
dequantized the matrix dequantized, then MLX's plain matmul

No name of a chip is looked at. What a way does is backend.py's; here are only names and times.
"""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import first_use, geometry, kernel_text
from spqt_cli.backends.interface import Projection
from spqt_cli.format import layout
from spqt_cli.system import files

Call = Callable[[mx.array, Projection], mx.array]

NAMES = ("few", "matrix", "quantized", "dequantized")
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512, 2048)  # of rows, up to which a way is chosen
MOST_FEW = 64  # rows: each further eight read the weights again
# Rows. The matrix unit takes weights rounded to x's dtype, as MLX's own matmuls do, which adds less to an
# error than the result's own rounding. Two to four rows, as of decode steps and drafts, keep `few` and its
# float32 sums of exact products. From five on decode steps and prompts alike may take the matrix unit: `few`
# takes twice as long there on an H200, and half active as long as all, for products set its time, not reads.
LEAST_MATRIX = 5

# Where each way is timed, in this order, as time may end; between two counts its time is a straight line.
TIMED = {
    "few": (8, 4, 16, 64),
    "matrix": (64, 8, 32, 16, 128, 256),
    "dequantized": (512, 64, 2048, 128, 256),
    "quantized": (64, 8, 512, 4, 32, 128, 2048),
}
SECONDS = 5.0  # of timing, at most; kernels are compiled and checked before, as their first use would
SHAPE = (14336, 4096)  # outputs, inputs: an 8B model's
COPIES = 2  # in turns, together larger than an H200's cache
CALLS = 4  # in one evaluation
REPEATS = 3
LONG = 0.15  # seconds of an evaluation that is not repeated
_chosen: dict["Kind", "Choice"] = {}  # by this process


class Kind(NamedTuple):
    """What a choice holds for besides the device."""

    dtype: mx.Dtype
    bits: int
    group_size: int

    def words(self) -> str:
        return f"{str(self.dtype).rsplit('.', maxsplit=1)[-1]}, {self.bits} bits, groups of {self.group_size}"


class Choice(NamedTuple):
    """ways: of each of COUNTS; us: what was timed, per way and count, microseconds.

    seconds: that timing took; compiled: seconds before that for compiling and checking kernels.
    """

    ways: list[str]
    us: dict[str, dict[str, float]]
    seconds: float
    compiled: float

    def words(self) -> str:
        """As `few to 8 rows, matrix to 256, then dequantized`."""
        parts: list[str] = []
        for i, (way, count) in enumerate(zip(self.ways, COUNTS, strict=True)):
            if i + 1 == len(COUNTS) or len(set(self.ways[i:])) == 1:
                parts.append(f"then {way}" if parts else f"all {way}")
                break
            if self.ways[i + 1] != way:
                parts.append(f"{way} to {count}" + (" rows" if not parts else ""))
        took = f"timed in {self.seconds:.1f} s, kernels compiled and checked in {self.compiled:.1f} s"
        return f"{', '.join(parts)} ({took})"


def best(rows: int, layer: Projection, dtype: mx.Dtype, calls: Mapping[str, Call]) -> str:
    """The way for so many rows of such an x and layer; the first call of a device times them, in SECONDS."""
    choice = choice_for(Kind(dtype, layer.bits, layer.group_size), calls)
    return choice.ways[next((i for i, count in enumerate(COUNTS) if rows <= count), -1)]


def choice_for(kind: Kind, calls: Mapping[str, Call]) -> Choice:
    """The choice for a kind of layer, remembered or timed now."""
    if kind not in _chosen:
        key = f"{here()}, {kind.words()}"
        if key not in known():
            known()[key] = measured(kind, calls)
            if not first_use.refused():  # else others stood in for our kernels
                first_use.store(_file(), {name: choice._asdict() for name, choice in known().items()})
        _chosen[kind] = known()[key]
    return _chosen[kind]


def report() -> list[str]:
    """What is known of this machine, a line for each kind."""
    return [
        f"{name.removeprefix(here()).lstrip(', ')}: {choice.words()}"
        for name, choice in known().items()
        if name.startswith(here())
    ]


@cache
def here() -> str:
    """The machine, and the kernels that were timed: their texts and how they are cut."""
    texts = [kernel_text.body(name) for name in kernel_text.names()]
    said = hashlib.sha256("\0".join([*texts, Path(geometry.__file__).read_text()]).encode()).hexdigest()
    return f"{first_use.machine()} {said[:12]}"


@cache
def known() -> dict[str, Choice]:
    """The choices by machine and kind; a file that is none is as good as none."""
    try:
        found = {name: Choice(**fields) for name, fields in json.loads(_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {
        name: one
        for name, one in found.items()
        if len(one.ways) == len(COUNTS) and set(one.ways) <= set(NAMES)
    }


def _file() -> Path:
    return files.cache_folder() / "many-rows.json"


def measured(kind: Kind, calls: Mapping[str, Call]) -> Choice:
    """Times the ways that there are on this device; says so, for it can take seconds."""
    began = time.perf_counter()
    print(f"spqt: timing how many rows are multiplied here ({kind.words()}), once", file=sys.stderr)
    layers = [_layer(kind, seed) for seed in range(COPIES)]
    points = _points(kind.dtype, calls)
    for way, count in points:
        mx.eval(calls[way](_rows(kind, count), layers[0]))
    compiled = time.perf_counter() - began
    us: dict[str, dict[str, float]] = {}
    for way, count in points:
        if time.perf_counter() - began - compiled < SECONDS:
            us.setdefault(way, {})[str(count)] = _microseconds(calls[way], _rows(kind, count), layers)
    ways = [_fastest(count, kind.dtype, us) for count in COUNTS]
    seconds = time.perf_counter() - began - compiled
    return Choice(ways, us, round(seconds, 1), round(compiled, 1))


def _points(dtype: mx.Dtype, calls: Mapping[str, Call]) -> list[tuple[str, int]]:
    """What is timed: each way's first count, then each way's second, and so on."""
    turns = itertools.zip_longest(*([(way, count) for count in counts] for way, counts in TIMED.items()))
    return [
        point
        for turn in turns
        for point in turn
        if point is not None and point[0] in calls and is_possible(point[0], point[1], dtype)
    ]


def _rows(kind: Kind, count: int) -> mx.array:
    return mx.random.normal((1, count, SHAPE[1]), key=mx.random.key(count)).astype(kind.dtype)


def is_possible(way: str, rows: int, dtype: mx.Dtype) -> bool:
    """Whether a way can multiply so many rows on this device."""
    if way == "few":
        return rows <= MOST_FEW
    if way == "matrix":
        wide = int(mx.device_info().get("compute_capability_major", 0)) >= 8
        return mx.cuda.is_available() and wide and dtype != mx.float32 and rows >= LEAST_MATRIX
    # On CUDA MLX compiles a quantized matmul of our layout for ten seconds, and dequantizing is faster.
    return way != "quantized" or not mx.cuda.is_available()


def _fastest(rows: int, dtype: mx.Dtype, us: Mapping[str, Mapping[str, float]]) -> str:
    expected = {way: _expected(rows, times) for way, times in us.items() if is_possible(way, rows, dtype)}
    return min(expected, key=lambda way: expected[way])


def _expected(rows: int, times: Mapping[str, float]) -> float:
    """Microseconds for so many rows: a straight line between the timed counts around.

    Below the smallest as for that; above the largest in proportion.
    """
    counts = sorted(map(int, times))
    if rows > counts[-1]:
        return times[str(counts[-1])] * rows / counts[-1]
    return float(np.interp(rows, counts, [times[str(count)] for count in counts]))


def _microseconds(call: Call, x: mx.array, layers: list[problems.Matrix]) -> float:
    """Of one call, the least of a few evaluations."""
    mx.eval(x)
    times: list[float] = []
    while len(times) < REPEATS and (not times or times[-1] < LONG):
        start = time.perf_counter()
        mx.eval([call(x, layers[i % len(layers)]) for i in range(CALLS)])
        times.append(time.perf_counter() - start)
    return round(min(times) / CALLS * 1e6, 1)


def _layer(kind: Kind, seed: int) -> problems.Matrix:
    return filled(kind, SHAPE, seed)


def filled(kind: Kind, shape: tuple[int, int], seed: int) -> problems.Matrix:
    """A matrix (outputs, inputs) of random codes; the caller's random numbers stay as they were."""
    outputs, inputs = shape
    band = layout.band_of(outputs, kind.group_size)
    codes, scales = layout.packed_shapes((outputs, inputs), kind.bits, kind.group_size, band)
    words = mx.random.randint(-(2**31), 2**31 - 1, codes, key=mx.random.key(seed)).view(mx.uint32)
    small = mx.full(scales, 0.01, kind.dtype)
    mx.eval(words, small)
    return problems.Matrix(outputs, kind.bits, kind.group_size, (words, small, -small))
