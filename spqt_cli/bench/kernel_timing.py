"""One projection at a time: stock MLX, Zigzag dense and sparse, per call; and where sparse stops paying.

Calls form a chain, each fed by the one before as in decoding, so that nothing overlaps that would not
overlap there. The link of the chain, one tiny elementwise operation, is in every time, which makes
ratios smaller, never larger. Weights rotate over more memory than caches hold; graph building and dispatch
are in every time.
"""

import functools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from spqt_cli.backends import select
from spqt_cli.bench import projections, results
from spqt_cli.bench.projections import Copy, Work, make_copies, with_threshold
from spqt_cli.bench.results import Crossover, KernelRow, Stat
from spqt_cli.decode import profile

SAMPLE_SECONDS = 0.02  # least length of one sample: far above the clock's and the scheduler's noise
MOST_CALLS = 512  # of one sample
ASYNC_EVERY = 8  # calls between hand-overs to the device, so that it works while Python builds
HOST_CALLS = 32
LINK = "link"  # the chain without a product: part of every time
ROWS = "row-grouped"  # stock's layout by spqt's own kernel; without one, a row-grouped layer runs as stock
CLEARLY_FASTER = 0.97  # of the other's time, or less: more than noise

Call = Callable[[mx.array, Copy], list[mx.array]]


@dataclass
class Variant:
    """A way to compute a unit. sparsity: None for stock."""

    name: str
    sparsity: float | None
    call: Call
    copies: list[Copy]


def measure(
    work: Work, sparsities: Sequence[float], repetitions: int, copy_bandwidth: float
) -> tuple[list[KernelRow], Crossover, float]:
    """The rows of one unit, stock first, all variants interleaved; its crossover; us of a bare link."""
    copies = make_copies(work)
    x = mx.random.normal((1, 1, work.inputs)).astype(work.dtype)
    mx.eval(x)
    variants = [Variant("stock", None, _stock(work), copies)]
    if select.backend().native_float32 and len(copies[0].rows[0]) == 3:
        variants.append(Variant(ROWS, None, _rows_on_cpu(work), copies))
    variants.append(Variant("zigzag dense", 0.0, _dense, copies))
    for sparsity in [] if work.is_head else sorted({0.0, *sparsities}):
        skipping = with_threshold(copies, exact_threshold(x, sparsity))
        variants.append(Variant(f"sparse {sparsity:.0%}", sparsity, _sparse, skipping))
    times = _interleaved(variants, x, repetitions)
    link = times.pop(LINK)
    rows = []
    for variant in variants:
        time_stat = times[variant.name]
        host = Stat([_host_us(variant, x) for _ in range(max(repetitions, 3))])
        read, lines = read_bytes(variant, x)
        rate = read / time_stat.median * 1e6
        rows.append(
            KernelRow(
                unit=work.name,
                shape=work.shape,
                variant=variant.name,
                sparsity=variant.sparsity,
                time=time_stat,
                host=host,
                speedup=results.ratio(time_stat, times["stock"], of_times=True),
                weight_bytes=read,
                line_bytes=lines,
                bandwidth=rate,
                copy_share=rate / copy_bandwidth,
            )
        )
    return rows, crossover(work, rows), link.median


def read_bytes(variant: Variant, x: mx.array) -> tuple[int, int | None]:
    """(bytes of the weights that are read, the same in whole lines; None for stock) in one call."""
    copy = variant.copies[0]
    if variant.sparsity is None:
        return sum(array.nbytes for packed in copy.rows for array in packed), None
    magnitudes = np.abs(np.array(x.astype(mx.float32)).reshape(-1))
    read = lines = 0
    for layer in copy.layers:
        threshold = None if layer.threshold is None else np.array(layer.threshold)
        active = np.ones(x.size, bool) if threshold is None else ~(magnitudes < threshold)
        bands = layer.weight.shape[0]
        packed = (layer.weight, layer["scales"], layer["biases"])
        chunks = [array.nbytes // (bands * layer.inputs) for array in packed]
        read += int(active.sum()) * bands * sum(chunks)
        lines += projections.line_bytes(active, bands, chunks)
    return read, lines


def crossover(work: Work, rows: Sequence[KernelRow]) -> Crossover:
    """The density under which sparse beats the best dense way at every density measured, interpolated.

    Compared repetition by repetition, so that the machine's drift cancels.
    """
    times = {row.variant: row.time for row in rows}
    stock, zigzag = times.get(ROWS, times["stock"]), times["zigzag dense"]
    # A change of layout costs a second rounding, so it must win clearly: heads come row-grouped.
    gain = results.ratio(zigzag, stock, of_times=True).median  # above 1: Zigzag is faster
    rows_win = gain * CLEARLY_FASTER <= 1 if work.is_head else gain < CLEARLY_FASTER
    otherwise, dense = (profile.ROWS, stock) if rows_win else (profile.ZIGZAG, zigzag)
    points = [
        (1 - (row.sparsity or 0.0), results.ratio(dense, row.time, of_times=True).median)
        for row in rows
        if row.variant.startswith("sparse")
    ]
    return Crossover(work.name, work.shape, work.key, crossing(sorted(points)), otherwise)


def crossing(points: Sequence[tuple[float, float]]) -> float:
    """The density up to which (density, time relative to dense), rising densities, stays below 1.

    0 if it never does, 1 if always; between two densities by a straight line.
    """
    last: tuple[float, float] | None = None
    for density, value in points:
        if value >= 1:
            if last is None:
                return 0.0
            return last[0] + (1 - last[1]) / (value - last[1]) * (density - last[0])
        last = (density, value)
    return 1.0 if last is not None else 0.0


def exact_threshold(x: mx.array, sparsity: float) -> mx.array:
    """The threshold, (1,) float32, below which exactly that fraction of x's channels lies, ties aside."""
    magnitudes = np.sort(np.abs(np.array(x.astype(mx.float32)).reshape(-1)))
    skipped = round(sparsity * magnitudes.size)
    return mx.array([float(magnitudes[skipped]) if skipped else 0.0], mx.float32)


def _stock(work: Work) -> Call:
    def call(x: mx.array, copy: Copy) -> list[mx.array]:
        return [
            mx.quantized_matmul(x, *packed, transpose=True, group_size=work.group_size, bits=work.bits)
            if len(packed) == 3
            else x @ packed[0].T
            for packed in copy.rows
        ]

    return call


def _rows_on_cpu(work: Work) -> Call:
    from spqt_cli.backends import cpu

    def call(x: mx.array, copy: Copy) -> list[mx.array]:
        return [cpu.head_matmul(x, w, s, b, work.bits, work.group_size) for w, s, b in copy.rows]

    return call


def _dense(x: mx.array, copy: Copy) -> list[mx.array]:
    return [select.matmul(x, layer) for layer in copy.layers]


def _sparse(x: mx.array, copy: Copy) -> list[mx.array]:
    return select.sparse_gemv(x, copy.layers)[0]


@mx.compile
def _link(x: mx.array, ys: list[mx.array]) -> mx.array:
    """x again, but not before all of ys are there."""
    total = functools.reduce(operator.add, (y[..., :1] for y in ys))
    return x + 0 * total.astype(x.dtype)


def _chain(variant: Variant | None, x: mx.array, calls: int) -> float:
    """Seconds per call of a chain of `calls` calls; without a variant, of its links alone."""
    mx.synchronize()
    start = time.perf_counter()
    value = x
    for at in range(calls):
        ys = [value] if variant is None else variant.call(value, variant.copies[at % len(variant.copies)])
        value = _link(x, ys)
        if at % ASYNC_EVERY == ASYNC_EVERY - 1:
            mx.async_eval(value)
    mx.eval(value)
    mx.synchronize()
    return (time.perf_counter() - start) / calls


def _interleaved(variants: list[Variant], x: mx.array, repetitions: int) -> dict[str, Stat]:
    """Microseconds per call of each variant and of the bare link: one sample of each a repetition."""
    everything: list[Variant | None] = [None, *variants]
    lengths = []
    for variant in everything:
        _chain(variant, x, len(variants[0].copies))  # kernels are built, pages touched
        lengths.append(int(min(max(SAMPLE_SECONDS / _chain(variant, x, 4), 4), MOST_CALLS)))
    samples: dict[str, list[float]] = {variant.name if variant else LINK: [] for variant in everything}
    for _ in range(repetitions):
        for variant, calls in zip(everything, lengths, strict=True):
            samples[variant.name if variant else LINK].append(_chain(variant, x, calls) * 1e6)
    return {name: Stat(values) for name, values in samples.items()}


def _host_us(variant: Variant, x: mx.array) -> float:
    """Microseconds that Python takes to build one call's graph; nothing is computed."""
    copies = variant.copies
    start = time.perf_counter()
    built = [variant.call(x, copies[at % len(copies)]) for at in range(HOST_CALLS)]
    elapsed = time.perf_counter() - start
    del built
    return elapsed / HOST_CALLS * 1e6
