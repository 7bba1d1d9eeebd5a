"""Which tiles of outputs the product of one row takes on this GPU: timed once per device, and remembered.

A class of Apple GPUs may take wide tiles, which read no line twice, or narrow ones, of which more fit a core.
Nobody could time them for us, so the user's machine does, in at most five seconds, when the first layer is
planned. On CUDA there is one kind. geometry.py says how a tile is cut, backend.py how a product is launched.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import first_use, geometry, ways
from spqt_cli.backends.gpu.ways import Kind
from spqt_cli.system import files

Product = Callable[[mx.array], mx.array]
Make = Callable[[mx.array, problems.Matrix, str], Product]  # of an x, a layer and a tile's name

SECONDS = 5.0  # of timing, at most; kernels are compiled before
SHAPES = ((14336, 4096), (4096, 14336))  # outputs, inputs: an 8B model's
COPIES = 2  # in turns, together larger than a cache
CALLS = 8  # in one evaluation, each fed by the one before, as in a model
REPEATS = 15
HALF = 0.6745  # the median size of a normal number: half of the channels are active
GAIN = 0.97  # of the first tile's time, at most: less is no reason to take another
_chosen: dict[Kind, str] = {}  # by this process


class Choice(NamedTuple):
    """tile: of geometry.TILES; us: microseconds of a call of each, summed over SHAPES."""

    tile: str
    us: dict[str, float]
    seconds: float

    def words(self) -> str:
        """As `narrow tiles, 0.91 of the time of wide ones`."""
        others = [f"{self.us[self.tile] / us:.2f} of the time of {name} ones"
                  for name, us in self.us.items() if name != self.tile and us > 0]  # fmt: skip
        return ", ".join([f"{self.tile} tiles", *others])


def best(device: str, kind: Kind, make: Make) -> str:
    """The tile for layers of a kind on a device of that class; the first call of a machine times them."""
    names = geometry.tiles_of(device)
    if len(names) == 1 or not mx.metal.is_available():
        return names[0]
    if kind not in _chosen:
        key = f"{ways.here()}, {kind.words()}"
        if key not in known():
            known()[key] = measured(kind, names, make)
            first_use.store(_file(), {name: choice._asdict() for name, choice in known().items()})
        _chosen[kind] = known()[key].tile
    return _chosen[kind]


def report() -> list[str]:
    """What is known of this machine, a line for each kind of layer."""
    return [
        f"{name.removeprefix(ways.here()).lstrip(', ')}: {choice.words()}"
        for name, choice in known().items()
        if name.startswith(ways.here())
    ]


@cache
def known() -> dict[str, Choice]:
    """The choices by machine and kind; a file that is none is as good as none."""
    try:
        found = {name: Choice(**fields) for name, fields in json.loads(_file().read_text()).items()}
        return {name: one for name, one in found.items() if one.tile in geometry.TILES and one.words()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _file() -> Path:
    return files.cache_folder() / "tiles.json"


def measured(kind: Kind, names: tuple[str, ...], make: Make) -> Choice:
    """Times the tiles in turns; says so, for it can take seconds. A tile whose kernel does not run loses."""
    print(f"spqt: timing tiles of products here ({kind.words()}), once", file=sys.stderr)
    runs: dict[str, list[Callable[[], None]]] = {}
    for name in names:
        try:
            runs[name] = [_run(kind, shape, name, make) for shape in SHAPES]
            for run in runs[name]:
                run()  # compiles
        except RuntimeError:  # which first_use.py tells when a layer wants it
            runs.pop(name, None)
    began = time.perf_counter()
    times: dict[str, list[list[float]]] = {name: [[] for _ in SHAPES] for name in runs}
    for repeat in range(REPEATS):
        for name, each in runs.items():
            for run, taken in zip(each, times[name], strict=True):
                if repeat == 0 or time.perf_counter() - began < SECONDS:
                    start = time.perf_counter()
                    run()
                    taken.append(time.perf_counter() - start)
    us = {
        name: round(math.fsum(map(statistics.median, taken)) / CALLS * 1e6, 1)
        for name, taken in times.items()
    }
    return Choice(_fastest(names, us), us, round(time.perf_counter() - began, 1))


def _fastest(names: tuple[str, ...], us: dict[str, float]) -> str:
    """The first unless another gains; the first, too, where nothing ran."""
    first = us.get(names[0], math.inf)
    fastest = min(us, key=lambda name: us[name], default=names[0])
    return fastest if us.get(fastest, math.inf) < GAIN * first else names[0]


def _run(kind: Kind, shape: tuple[int, int], name: str, make: Make) -> Callable[[], None]:
    """CALLS products in a row, each waiting for the one before."""
    layers = [ways.filled(kind, shape, seed) for seed in range(COPIES)]
    x = mx.random.normal((1, 1, shape[1]), key=mx.random.key(1)).astype(kind.dtype)
    for layer in layers:
        layer.set_threshold(HALF)
    products = [make(x, layer, name) for layer in layers]

    def run() -> None:
        row = x
        for call in range(CALLS):
            y = products[call % COPIES](row)
            row = row + y[..., :1] * 0.0
        mx.eval(row)

    return run
