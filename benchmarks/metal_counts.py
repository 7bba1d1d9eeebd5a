"""What can be counted of the Metal kernels without a Mac: nothing here is a time.

    python -m benchmarks.metal_counts                    # all Llama shapes
    python -m benchmarks.metal_counts --shape llama-3-8b

Instructions per weight and registers of the product's inner loop are counted in LLVM IR and need clang;
threadgroup memory, launches and memory lines follow from the rule of geometry and the layout. Works from a
bare checkout. tests/metal has the counters: count_instructions.py, count_registers.py, and count_traffic.py,
whose emulator counts the same lines.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.machine import from_bare_tree

from_bare_tree()
from benchmarks.apple_model import SEED, STOCK_LAUNCHES, matrix_bytes, units
from spqt_cli.backends.gpu import geometry
from spqt_cli.bench import projections, shapes
from spqt_cli.format import layout
from tests.metal import count_instructions, count_registers

LINE = 128  # bytes
CLASSES = {"g": "base, Pro", "s": "Max", "d": "Ultra"}
WAYS = {geometry.HALVES: "subnormal halves", geometry.CONVERT: "converted"}
AROUND = 3  # launches of a block that are MLX's own: keys and values into the cache, and attention
MOST_LINES = 0.54  # of the row-grouped form's, with half of the channels active
HALF = 0.5


def instructions() -> Iterator[list[str]]:
    """Of each way to decode: instructions of a weight on codes and in all, and registers of the loop."""
    clang = count_instructions.clang_path()
    if clang is None:
        raise SystemExit("no clang: instructions can't be counted (Debian's package is clang-14)")
    for decode, name in WAYS.items():
        text = count_instructions.ir(4, decode, clang)
        counts = count_instructions.ir_counts(text)
        each = count_instructions.weights(counts)
        on_codes, products = (counts[kind] / each for kind in ("codes", "multiply-adds"))
        everything = count_instructions.everything(counts)
        registers = count_registers.live(text)
        yield [name, *(f"{one:.2f}" for one in (on_codes, products, everything)), f"{registers:.0f}"]


def cut_of(sizes: Sequence[tuple[int, int]], kind: str) -> geometry.Geometry:
    """The rule's cut of a launch of projections (outputs, inputs), in 16 bits."""
    bands = [(band, -(-outputs // band)) for outputs, _ in sizes for band in [layout.band_of(outputs, 64)]]
    return geometry.choose(kind, bands, sizes[0][1])


def threadgroup_bytes(cut: geometry.Geometry, normed: bool) -> int:
    """Of GemvMemory in metal/sparse_gemv.metal."""
    narrow = cut.lanes < geometry.SIMD and geometry.SIMD % cut.lanes == 0
    held = cut.outputs * cut.lanes // geometry.SIMD if narrow else cut.outputs
    columns = geometry.SIMD if narrow else cut.lanes
    summands = cut.threads // geometry.SIMD if narrow else cut.rows
    simdgroups = cut.threads // geometry.SIMD
    listed = cut.list + cut.padded * cut.rows * cut.unroll
    numbers = simdgroups + (simdgroups if normed else 1) + summands * columns * min(cut.slice, held)
    return 8 * listed + 4 * numbers


def launches(shape: str, kind: str) -> int:
    """Of one block's decode step with fused blocks: a product, and its reduction where it has stripes."""
    return AROUND + sum(1 + (cut_of(sizes, kind).stripes(sizes[0][1]) > 1) for sizes in units(shape))


def line_share(sizes: Sequence[tuple[int, int]], seed: int = SEED) -> float:
    """Lines that a launch reads with half of its channels active, at random, over the row-grouped form's."""
    inputs = sizes[0][1]
    active = np.zeros(inputs, bool)
    active[np.random.default_rng(seed).permutation(inputs)[: round(HALF * inputs)]] = True
    read = 0
    for outputs, _ in sizes:
        band = layout.band_of(outputs, 64)
        chunks = projections.chunk_bytes(4, 64, band, 2)
        read += projections.line_bytes(active, -(-outputs // band), chunks, LINE)
    return read / sum(matrix_bytes(*size) for size in sizes)


def table(header: list[str], rows: Sequence[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def launch_rows(names: Sequence[str]) -> Iterator[list[str]]:
    """Of each launch of a shape: its lines at half, threads and threadgroup memory by class."""
    for name in names:
        for at, sizes in enumerate(units(name)):
            cuts = [cut_of(sizes, kind) for kind in CLASSES]
            memory = [f"{cut.threads} / {threadgroup_bytes(cut, at in (0, 2)) / 1024:.1f}" for cut in cuts]
            share = line_share(sizes)
            mark = "" if share <= MOST_LINES else " (over)"
            label = "+".join(f"{outputs}x{inputs}" for outputs, inputs in sizes)
            yield [name, label, f"{share:.1%}{mark}", *memory]


def alone_rows(names: Sequence[str]) -> Iterator[list[str]]:
    """Projections that share a launch, as if each had one of its own; those over the bar."""
    every = dict.fromkeys(size for name in names for sizes in units(name) if len(sizes) > 1 for size in sizes)
    for size in every:
        if (share := line_share([size])) > MOST_LINES:
            yield [f"{size[0]}x{size[1]}", f"{share:.1%}"]


def report(names: Sequence[str]) -> str:
    """All counts as markdown."""
    kinds = [f"threads / KB, {said}" for said in CLASSES.values()]
    parts = [
        "Instructions per weight at 4 bits, group 64, float16 (clang, LLVM IR), and registers of 32 bits:",
        table(["codes", "on codes", "multiply-adds", "all", "registers"], list(instructions())),
        f"Lines of {LINE} bytes read with half of the channels active, of the row-grouped form's (at most "
        f"{MOST_LINES:.0%}); threadgroup memory:",
        table(["shape", "launch", "lines", *kinds], list(launch_rows(names))),
    ]
    if alone := list(alone_rows(names)):
        parts += [f"Over {MOST_LINES:.0%} if launched alone:", table(["outputs x inputs", "lines"], alone)]
    rows = []
    for name in names:
        blocks = shapes.config(name)["num_hidden_layers"]
        each = {launches(name, kind) for kind in CLASSES}
        rows.append(
            [name, "-".join(map(str, sorted(each))), str(max(each) * blocks), str(STOCK_LAUNCHES * blocks)]
        )
    parts += [
        "Launches of a decode step: of a block, of all blocks, of stock's blocks:",
        table(["shape", "a block", "all blocks", "stock, all blocks"], rows),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metal_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=shapes.names(), help="one shape in the place of all Llama shapes")
    arguments = parser.parse_args()
    names = (
        [arguments.shape] if arguments.shape else [one for one in shapes.names() if one.startswith("llama")]
    )
    print(report(names))


if __name__ == "__main__":
    main()
