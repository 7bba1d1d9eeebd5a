"""A paper model of decode kernels on Apple GPUs. Everything it prints about our kernels is a PREDICTION.

    python -m benchmarks.apple_model                   # the fit, then predictions for every chip
    python -m benchmarks.apple_model --compare FILE    # with what `spqt bench --kernel --json` measured

Time of one projection = launches + the larger of (memory lines / bandwidth) and (cycles of its instructions).
Launch cost and the reachable fraction of the bandwidth come from the dense rows of one public table; its
sparse rows were not fitted and show how far to trust the model. Instructions are counted, ours in LLVM IR
(benchmarks/metal_counts.py). A range says what the model leaves open: lines of 32 or 128 bytes in the place
of the best, pipes that work side by side or one after the other. Written without a Mac.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.bench import projections, shapes
from spqt_cli.bench.chips import GB_PER_S
from spqt_cli.format import layout

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


SLOW_CYCLES = 4  # of a conversion or a shift, as measured on an M1 (philipturner/metal-benchmarks)


@dataclass(frozen=True)
class Work:
    """Instructions of a kernel's inner loop per weight. slow: those that take SLOW_CYCLES."""

    plain: float
    slow: float

    def cycles(self, *, side_by_side: bool = False) -> float:
        """Of one lane. side_by_side: slow ones, which have a pipe of their own, cost no issue slot."""
        slow = SLOW_CYCLES * self.slow
        return max(self.plain, slow) if side_by_side else self.plain + slow


# Ours at 4 bits as counted: multiply-adds, masks, addresses; shifts. Converted: for GPUs that flush halves.
OURS, CONVERTED = Work(1.78, 0.16), Work(1.53, 1.03)
# MLX's: mask, convert, multiply-add of every weight, by its source, addresses left out. mlx-SpQt's: likewise.
PEERS = Work(2.0, 1.0)


@dataclass(frozen=True)
class Chip:
    """A GPU. gb_per_s: of its memory, as published; ghz: of its GPU, as others measured, to about 10 %."""

    gb_per_s: float
    cores: int
    ghz: float

    @property
    def lane_cycles_per_s(self) -> float:
        return self.cores * LANES * self.ghz * 1e9


# The largest GPU sold under each name: (cores, GHz).
_GPUS = {
    "M1": (8, 1.28), "M1 Pro": (16, 1.28), "M1 Max": (32, 1.28), "M1 Ultra": (64, 1.28),
    "M2": (10, 1.40), "M2 Pro": (19, 1.40), "M2 Max": (38, 1.40), "M2 Ultra": (76, 1.40),
    "M3": (10, 1.40), "M3 Pro": (18, 1.40), "M3 Max": (40, 1.40), "M3 Ultra": (80, 1.40),
    "M4": (10, 1.50), "M4 Pro": (20, 1.50), "M4 Max": (40, 1.50),
}  # fmt: skip
CHIPS = {name: Chip(GB_PER_S[name], *gpu) for name, gpu in _GPUS.items()}
STOCK_LAUNCHES, OUR_LAUNCHES = 17, 11  # of one block (docs/log/gpu.md, benchmarks/metal_counts.py)
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


@cache
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
    """How well the model meets the table as text."""
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


@dataclass(frozen=True)
class Prediction:
    """Of one call: its parts in microseconds."""

    launch_us: float
    memory_us: float
    alu_us: float

    @property
    def us(self) -> float:
        return self.launch_us + max(self.memory_us, self.alu_us)


@dataclass(frozen=True)
class Kernel:
    """Whose kernel, on which layout. band: outputs of a stored band, None for the rule's; rows: row-grouped.

    shared: projections of one input take one call of two launches, else one launch each. form: bits and group
    size.
    """

    work: Work
    band: int | None = None
    rows: bool = False
    shared: bool = False
    form: tuple[int, int] = (4, 64)

    def bytes_read(self, sizes: Sequence[tuple[int, int]], density: float, line: int) -> float:
        """In whole lines, for projections (outputs, inputs) of one input."""
        if self.rows:
            return sum(matrix_bytes(*size, *self.form) for size in sizes)
        bands = [self.band or layout.band_of(outputs, self.form[1]) for outputs, _ in sizes]
        pairs = zip(sizes, bands, strict=True)
        return sum(touched(*size, density, band, line, self.form) for size, band in pairs)


STOCK, SPQT = Kernel(PEERS, rows=True), Kernel(OURS, shared=True)
MLX_SPQT = Kernel(PEERS, band=PUBLIC_BAND)  # collecting its indices is not counted, as in its table


def predict(
    chip: Chip, found: Fit, sizes: Sequence[tuple[int, int]], density: float | None, line: int,
    kernel: Kernel = SPQT,
) -> Prediction:  # fmt: skip
    """One call on projections (outputs, inputs) of one input, weights not in a cache.

    density: share of active channels; None: stock's dense product in the kernel's form, one launch for each
    projection.
    """
    if density is None:
        kernel, density = dataclasses.replace(STOCK, form=kernel.form), 1.0
    weights = sum(outputs * inputs for outputs, inputs in sizes) * density
    # Ours always counts two launches, the product and the sum over stripes.
    launches = 2 if kernel.shared else len(sizes)
    return Prediction(
        found.launch_us * launches,
        kernel.bytes_read(sizes, density, line) / (found.share * chip.gb_per_s * 1e3),
        weights * kernel.work.cycles() / chip.lane_cycles_per_s * 1e6,
    )


def span(
    chip: Chip, found: Fit, sizes: Sequence[tuple[int, int]], density: float, kernel: Kernel = SPQT
) -> tuple[float, float]:
    """The least and the most microseconds of a call that the model leaves open.

    Least: lines of 32 bytes, pipes side by side, one launch hidden. Most: lines of 128 bytes, and arithmetic
    after the loads in the place of beside them.
    """
    low, high = (predict(chip, found, sizes, density, line, kernel=kernel) for line in (LINES[0], LINES[-1]))
    share = kernel.work.cycles(side_by_side=True) / kernel.work.cycles()
    least = low.launch_us / 2 + max(low.memory_us, low.alu_us * share)
    return least, high.launch_us + high.memory_us + high.alu_us


def units(shape: str) -> list[list[tuple[int, int]]]:
    """The products of one block of a model, each a list of (outputs, inputs) that share a launch."""
    c = shapes.config(shape)
    hidden, inner = int(c["hidden_size"]), int(c["intermediate_size"])
    q, kv = (int(c[name] * c["head_dim"]) for name in ("num_attention_heads", "num_key_value_heads"))
    return [
        [(q, hidden), (kv, hidden), (kv, hidden)],
        [(hidden, q)],
        [(inner, hidden)] * 2,
        [(hidden, inner)],
    ]


def token_ms(
    chip: Chip, found: Fit, shape: str, density: float | None, line: int, kernel: Kernel = SPQT
) -> float:
    """Milliseconds that the weights of one token take: all blocks, and the head, which is always dense.

    Launches are left out: in a decode step they are queued ahead, and the table says nothing of that
    case. So are attention, norms and the host. The ratio of two of these is an upper bound.
    """
    c = shapes.config(shape)
    each = (predict(chip, found, u, density, line, kernel=kernel) for u in units(shape))
    block = sum(max(p.memory_us, p.alu_us) for p in each)
    head = predict(chip, found, [(int(c["vocab_size"]), int(c["hidden_size"]))], None, line)
    return (block * c["num_hidden_layers"] + head.memory_us) / 1e3


def launches_ms(found: Fit, shape: str, each_block: int) -> float:
    """Milliseconds of all launches of a token's blocks if none is hidden, at the table's cost of one."""
    return found.launch_us * each_block * int(shapes.config(shape)["num_hidden_layers"]) / 1e3


def report(shape: str) -> str:
    """The fit with its errors, and the predictions for every chip, as markdown."""
    found = fit()
    line = best_line(found)
    calls = [_call(name, sizes, found, line) for name in CHIPS for sizes in units(shape)]
    tokens = [_token(name, shape, found, line) for name in CHIPS]
    per_call = ["chip", "projections", "stock", "mlx-SpQt, 50 %", "0 % skipped", "25 %", "50 %", "75 %"]
    per_token = ["chip", "stock", "mlx-SpQt, 50 %", "0 % skipped", "25 %", "50 %", "at most, 25 %"]
    cycles = f"{OURS.cycles():.1f} cycles a weight ({CONVERTED.cycles():.1f} where codes are converted)"
    stock, ours = (launches_ms(found, shape, each) for each in (STOCK_LAUNCHES, OUR_LAUNCHES))
    ratios = ["stock / ours at 50 %", "ALU / memory: stock, ours at 50 %"]
    return "\n\n".join([
        fit_report(found),
        f"us per call on the {PUBLIC_CHIP}, table (model):",
        _table(["outputs x inputs", "stock", "half active", "quarter active"], _public(found, line)),
        f"PREDICTION, not a measurement: {shape}, 4 bits, group 64, us per call, weights in memory; ours\n"
        f"takes {cycles}, stock and mlx-SpQt {PEERS.cycles():.1f}.",
        _table([*per_call, "open at 50 %", *ratios], calls),
        "PREDICTION: ms a token for the weights alone (no launches, attention, norms or host), and the\n"
        "ratio to stock that this would allow at most. Launches, if none were hidden: stock\n"
        f"{stock:.1f} ms, ours {ours:.1f}.",
        _table([*per_token, "at most, 50 %", "50 %, all launches"], tokens),
    ])  # fmt: skip


def _call(name: str, sizes: list[tuple[int, int]], found: Fit, line: int) -> list[str]:
    """A chip's row for one call."""
    chip = CHIPS[name]
    stock = predict(chip, found, sizes, None, line)
    other = predict(chip, found, sizes, 0.5, line, kernel=MLX_SPQT)
    ours = [predict(chip, found, sizes, density, line) for density in (1.0, 0.75, 0.5, 0.25)]
    least, most = span(chip, found, sizes, 0.5)
    alu = f"{stock.alu_us / stock.memory_us:.0%}, {ours[2].alu_us / ours[2].memory_us:.0%}"
    times = [f"{one.us:.0f}" for one in (stock, other, *ours)]
    return [name, _names(sizes), *times, f"{least:.0f} to {most:.0f}", f"{stock.us / ours[2].us:.2f}", alu]


def _token(name: str, shape: str, found: Fit, line: int) -> list[str]:
    """A chip's row for one token."""
    chip = CHIPS[name]
    stock = token_ms(chip, found, shape, None, line)
    other = token_ms(chip, found, shape, 0.5, line, MLX_SPQT)
    ours = [token_ms(chip, found, shape, density, line) for density in (1.0, 0.75, 0.5)]
    whole = [
        stock + launches_ms(found, shape, STOCK_LAUNCHES),
        ours[2] + launches_ms(found, shape, OUR_LAUNCHES),
    ]
    ratios = [stock / ours[1], stock / ours[2], whole[0] / whole[1]]
    return [name, *(f"{one:.1f}" for one in (stock, other, *ours)), *(f"{one:.2f}" for one in ratios)]


def _public(found: Fit, line: int) -> list[list[str]]:
    """Rows of the public table, each time with the model's beside it."""
    return [
        [f"{shape[0]} x {shape[1]}"]
        + [f"{us} ({public_us(found, shape, d, line):.0f})" for us, d in zip(row, DENSITIES, strict=True)]
        for shape, row in PUBLIC.items()
    ]


def _names(sizes: Sequence[tuple[int, int]]) -> str:
    return "+".join(f"{outputs}x{inputs}" for outputs, inputs in sizes)


def compare(document: dict[str, Any], chip_name: str | None) -> str:
    """Measured kernel rows of `spqt bench --kernel --json` beside the model's, as markdown."""
    device = str(document["machine"]["device"])
    name = chip_name or device.removeprefix("Apple ").strip()
    if name not in CHIPS:
        raise SystemExit(f"no chip {name!r}; give one with --chip: {', '.join(CHIPS)}")
    found = fit()
    line = best_line(found)
    form = (document["settings"].get("bits", 4), document["settings"].get("group_size", 64))
    kernel = dataclasses.replace(SPQT, form=form)
    rows, errors = [], []
    for row in document["rows"]:
        sizes = [(int(o), int(i)) for o, i in (part.split("x") for part in row["shape"].split("+"))]
        if row["variant"] not in ("stock", "zigzag dense") and row["sparsity"] is None:
            continue  # a kernel that the model knows nothing of
        density = None if row["variant"] == "stock" else 1 - row["sparsity"]
        predicted = predict(CHIPS[name], found, sizes, density, line, kernel).us
        measured = row["time"]["median"]
        errors.append(math.log(measured / predicted))
        rows.append(
            [row["unit"], row["shape"], row["variant"], f"{predicted:.1f}", f"{measured:.1f}",
             f"{measured / predicted:.2f}"]
        )  # fmt: skip
    title = f"{device} as {name}: PREDICTED and measured us per call"
    typical = f"typical factor between the two: {math.exp(rms(errors)):.2f}"
    header = ["unit", "outputs x inputs", "variant", "predicted", "measured", "measured / predicted"]
    return "\n\n".join([title, _table(header, rows), typical])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the predictions, or a measured file beside them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.apple_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="llama-3-8b", choices=shapes.names())
    parser.add_argument("--compare", type=Path, metavar="FILE", help="output of spqt bench --kernel --json")
    parser.add_argument("--chip", choices=CHIPS, help="where the file's device is not one of them")
    arguments = parser.parse_args()
    if arguments.compare is None:
        print(report(arguments.shape))
    else:
        print(compare(json.loads(arguments.compare.read_text(encoding="utf-8")), arguments.chip))


if __name__ == "__main__":
    main()
