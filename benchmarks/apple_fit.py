"""Launch cost and bandwidth of an Apple GPU, fitted to one public table; part of apple_model.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spqt_cli.bench import projections

SCALE_BYTES = 2
LINES = (32, 64, 128)  # candidate sizes of a memory transaction; the table decides
LANES = 128  # of one GPU core, one instruction a cycle each
SEED = 0

# Public table of mlx-SpQt's README, M4 Pro, 4 bits, group 64, its band 64 (32-byte chunks), us per call,
# index collection not included: (outputs, inputs): (stock dense, half active, quarter active).
PUBLIC_CHIP = "M4 Pro"
PUBLIC_BAND = 64
DENSITIES = (None, 0.5, 0.25)  # of the table's columns; None: stock's dense product
PUBLIC = {
    (1024, 1024): (11, 13, 12),
    (2048, 2048): (15, 17, 19),
    (4096, 4096): (34, 34, 25),
    (8192, 8192): (169, 140, 102),
    (4096, 11008): (118, 95, 62),
    (11008, 4096): (113, 100, 62),
    (4096, 16384): (171, 138, 97),
}


@dataclass(frozen=True)
class Chip:
    """A GPU. gb_per_s: of its memory, as published; ghz: of its GPU, as others measured, to about 10 %."""

    gb_per_s: float
    cores: int
    ghz: float

    @property
    def instructions_per_s(self) -> float:
        return self.cores * LANES * self.ghz * 1e9


# The largest GPU sold under each name. There is no M4 Ultra; its row supposes two M4 Max.
CHIPS = {
    "M1": Chip(68.3, 8, 1.28), "M1 Pro": Chip(204.8, 16, 1.28), "M1 Max": Chip(409.6, 32, 1.28),
    "M1 Ultra": Chip(819.2, 64, 1.28),
    "M2": Chip(102.4, 10, 1.40), "M2 Pro": Chip(204.8, 19, 1.40), "M2 Max": Chip(409.6, 38, 1.40),
    "M2 Ultra": Chip(819.2, 76, 1.40),
    "M3": Chip(102.4, 10, 1.40), "M3 Pro": Chip(153.6, 18, 1.40), "M3 Max": Chip(409.6, 40, 1.40),
    "M3 Ultra": Chip(819.2, 80, 1.40),
    "M4": Chip(120.0, 10, 1.50), "M4 Pro": Chip(273.1, 20, 1.50), "M4 Max": Chip(546.1, 40, 1.50),
    "M4 Ultra (supposed)": Chip(1092.2, 80, 1.50),
}  # fmt: skip
CACHED_MB = 24  # stored matrices up to here are read from the system-level cache in the table's loop


@dataclass(frozen=True)
class Fit:
    """launch_us: of one call; share: of the published bandwidth; cached_gb_per_s: of the M4 Pro's cache."""

    launch_us: float
    share: float
    cached_gb_per_s: float


def matrix_bytes(outputs: int, inputs: int, bits: int = 4, group_size: int = 64) -> float:
    """Bytes of a quantized matrix: codes, scales and biases; the same in both layouts."""
    return outputs * inputs * (bits / 8 + 2 * SCALE_BYTES / group_size)


def touched(
    outputs: int, inputs: int, density: float, band: int, line: int, form: tuple[int, int] = (4, 64)
) -> int:
    """Bytes in whole lines that a Zigzag matrix gives up when a random share of its channels is active.

    form: bits and group size.
    """
    active = np.zeros(inputs, bool)
    active[np.random.default_rng(SEED).permutation(inputs)[: round(density * inputs)]] = True
    bits, group_size = form
    chunks = projections.chunk_bytes(bits, group_size, band, SCALE_BYTES)
    return projections.line_bytes(active, -(-outputs // band), chunks, line)


def fit() -> Fit:
    """Launch cost and bandwidths that bring the dense rows of the table nearest, in relative error.

    Two straight lines with a common start: matrices that the cache holds, and those it doesn't.
    """
    rows = []
    for (outputs, inputs), (stock, _, _) in PUBLIC.items():
        size = matrix_bytes(outputs, inputs)
        cached = size <= CACHED_MB * 1e6
        rows.append(np.array([1, size * cached, size * (not cached)]) / stock)
    launch, per_cached, per_memory = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    bandwidth = 1e-3 / per_memory
    return Fit(float(launch), float(bandwidth / CHIPS[PUBLIC_CHIP].gb_per_s), float(1e-3 / per_cached))


def public_errors(found: Fit, line: int | None, above_bytes: float = 0) -> list[float]:
    """Relative errors of the model against the table: its dense rows, or its sparse ones at a line size.

    above_bytes: leave out smaller matrices.
    """
    return [
        public_us(found, shape, density, line) / measured - 1
        for shape, row in PUBLIC.items()
        if matrix_bytes(*shape) > above_bytes
        for density, measured in zip(DENSITIES, row, strict=True)
        if (density is None) == (line is None)
    ]


def public_us(found: Fit, shape: tuple[int, int], density: float | None, line: int | None) -> float:
    """The model's microseconds for an entry of the table; density None: stock's dense product."""
    size = matrix_bytes(*shape)
    cached = size <= CACHED_MB * 1e6
    speed = found.cached_gb_per_s if cached else found.share * CHIPS[PUBLIC_CHIP].gb_per_s
    if density is not None and line is not None:
        size = touched(*shape, density, PUBLIC_BAND, line)
    return found.launch_us + size / speed / 1e3


def best_line(found: Fit) -> int:
    """The line size with which the sparse rows come out nearest."""
    return min(LINES, key=lambda line: rms(public_errors(found, line)))


def rms(errors: Sequence[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def fit_report(found: Fit) -> str:
    """How well the model meets the table, for people."""
    dense = public_errors(found, None)
    chip = CHIPS[PUBLIC_CHIP]
    lines = [
        f"Fit to the {len(dense)} dense rows of the {PUBLIC_CHIP} table: launch {found.launch_us:.1f} us;",
        f"memory {found.share:.0%} of {chip.gb_per_s} GB/s; cache {found.cached_gb_per_s:.0f} GB/s.",
        f"Its error there: {_summary(dense)} (three numbers fitted, and the cache's size chosen).",
        f"The {2 * len(dense)} sparse rows, nothing fitted to them but the choice of one line size:",
    ]
    for line in LINES:
        large = public_errors(found, line, CACHED_MB * 1e6)
        lines.append(
            f"- lines of {line} bytes: {_summary(public_errors(found, line))}; "
            f"matrices over {CACHED_MB} MB alone: {_summary(large)}"
        )
    lines.append(
        f"Used below: {best_line(found)} bytes. A minus means that the model promises too much speed."
    )
    return "\n".join(lines)


def _summary(errors: Sequence[float]) -> str:
    mean = sum(errors) / len(errors)
    return f"rms {rms(errors):.0%}, mean {mean:+.0%}, worst {max(errors, key=abs):+.0%}"
