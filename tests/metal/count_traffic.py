"""Counts the 128-byte lines that the kernels read, by the emulator.

python -m tests.metal.count_traffic           # the tables of metal/README.md, some minutes
"""

import sys
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from spqt_cli.backends.gpu import geometry, rows
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout
from tests.metal.emulator import emulate

LINE = 128
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (11008, 4096)]


@dataclass
class Count:
    """Lines, as shares of (codes + scales + biases of the row-grouped form) / 128."""

    density: float
    distinct: float
    summed: float  # over threadgroups, of the lines distinct within each
    other: float  # x and settings, summed over threadgroups
    partials: float  # written, and read again by the reduction
    faults: list[str]


def activity(inputs: int, density: float, clustered: bool) -> np.ndarray:
    """(inputs,) bool: independent channels, or runs of 8 to 63."""
    random = np.random.default_rng(5)
    if not clustered:
        return random.random(inputs) < density
    lengths = random.integers(8, 64, inputs)
    return np.repeat(random.random(inputs) < density, lengths)[:inputs]


def _empty(outputs: int, inputs: int, bits: int, band: int) -> ZigzagLinear:
    """A layer of zeros with a threshold of 1."""
    codes, scales = layout.packed_shapes((outputs, inputs), bits, 64, band)
    layer = ZigzagLinear(outputs, bits, 64, band)
    layer.weight = mx.zeros(codes, dtype=mx.uint32)
    layer.scales, layer.biases = mx.zeros(scales, dtype=mx.float16), mx.zeros(scales, dtype=mx.float16)
    layer.set_threshold(1.0)
    return layer


def count(shape: tuple[int, int], bits: int, band: int, active: np.ndarray, kind: str = "g") -> Count:
    """The traffic of one call at 16-bit scales and group 64, with the rule's geometry for a device class."""
    outputs, inputs = shape
    layer = _empty(outputs, inputs, bits, band)
    x = mx.array(np.where(active, 2.0, 0.5).astype(np.float16)).reshape(1, 1, inputs)
    cut = geometry.choose(kind, [(band, -(-outputs // band))], inputs)
    plan = launching.make_plan(x.shape, x.dtype, [layer], cut, launching.Form())
    assert plan.gemv is not None
    found = emulate(plan.gemv, plan.first_inputs(x))
    read = found.traffic["packed"]
    distinct = read.lines
    size = outputs * inputs * (bits / 8 + 4 / 64) / LINE
    written = found.traffic["partials"].written_bytes / LINE if plan.reduce else 0.0
    return Count(
        float(active.mean()),
        distinct / size,
        read.lines_summed / max(distinct, 1),
        (found.traffic["x"].lines_summed + found.traffic["settings"].lines_summed) / size,
        2 * written / size,
        found.reports,
    )


def count_rows(shape: tuple[int, int], bits: int, active: np.ndarray, kind: str = "g") -> Count:
    """As `count`, of a few rows. active: (rows, inputs) bool; density: of channels that any row needs."""
    outputs, inputs = shape
    band = layout.band_of(outputs, 64)
    layer = _empty(outputs, inputs, bits, band)
    x = mx.array(np.where(active, 2.0, 0.5).astype(np.float16))[None]
    cut = geometry.choose_rows(kind, [(band, -(-outputs // band))], inputs, len(active))
    plan = rows.make_plan(x.dtype, [layer], cut, dense=False)
    product, _ = rows._launches(x.shape, len(active), plan)
    found = emulate(product, [x, *plan.inputs, rows._count(len(active))])
    read = found.traffic["packed"]
    size = outputs * inputs * (bits / 8 + 4 / 64) / LINE
    written = found.traffic["partials"].written_bytes / LINE if plan.reduce else 0.0
    other = sum(found.traffic[name].lines_summed for name in ("x", "settings", "rows"))
    return Count(
        float(active.any(axis=0).mean()),
        read.lines / size,
        read.lines_summed / max(read.lines, 1),
        other / size,
        2 * written / size,
        found.reports,
    )


def main() -> None:
    print(
        "| shape | band | bits | activity | density | lines | over density | sum / distinct | x | partials |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        outputs, inputs = shape
        rule = layout.band_of(outputs, 64)
        others = {64} if outputs == 4096 else {outputs // 4, outputs // 2}  # beside the rule's and the widest
        for band in sorted({rule, outputs} | others):
            for bits in (3, 4, 8):
                for clustered, density in ((False, 0.5), (True, 0.5), (False, 0.25), (False, 1.0)):
                    if band not in (rule,) and (clustered or density == 0.25 or bits == 8):
                        continue
                    one = count(shape, bits, band, activity(inputs, density, clustered))
                    name = "runs" if clustered else "random"
                    label = f"{outputs}x{inputs} | {band} | {bits} | {name}"
                    shares = f"{one.density:.3f} | {one.distinct:.3f} | {one.distinct - one.density:+.3f}"
                    print(f"| {label} | {shares} | {one.summed:.3f} | {one.other:.3f} | {one.partials:.3f} |")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
