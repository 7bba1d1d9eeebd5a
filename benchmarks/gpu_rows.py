"""More than one row on a GPU: each way of ours in turns with stock MLX, and other cuts of the kernels.

    python -m benchmarks.gpu rows [OUTPUTS INPUTS] --output OUT
    python -m benchmarks.gpu rows-sweep [OUTPUTS INPUTS] --output OUT
    python -m benchmarks.gpu rows-chain --output OUT

benchmarks/gpu.py says what a measurement is, and makes the matrices.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from benchmarks.gpu import Packed, layers_of, row_grouped, set_density
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import dequantize, geometry, many, ways
from spqt_cli.backends.gpu import first_use as checks
from spqt_cli.backends.gpu import rows as more_rows
from spqt_cli.format import layout

FEW_TO_MANY = (2, 3, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROWS_SHAPES = [(14336, 4096), (4096, 14336), (28672, 8192)]
ROWS_CALLS, ROWS_REPEATS = 24, 9
LARGE_CALLS = 6  # where each call makes a whole matrix anew
SPARSE_ROWS = 8  # up to which the masked product is timed as well
SWEEP_SECONDS, SWEEP_REPEATS = 80.0, 5
FILLS = (0.25, 0.5, 1.0)  # threadgroups for each that the multiprocessors hold at one time
CHAINED = ((14336, 4096), (4096, 14336))  # each reads what the other makes
LINKS = 24  # pairs of products in a chain
CHAINED_COUNTS = (16, 64, 128, 8, 32, 2, 4)

# What is swept: what is not known comes first, as time may end. About 25 kernels, each of which compiles
# for a second or more; shapes, stripes and other counts cost little beside it.
GEMM_CUTS = {
    32: [(32, 128, 32, 32, 32, 2, 4)],
    64: [(64, 128, 32, 64, 32, 1, 3), (64, 128, 32, 64, 32, 2, 3), (64, 256, 32, 64, 32, 2, 2)],
    128: [(128, 128, 32, 64, 32, 1, 2), (128, 256, 32, 64, 64, 2, 1)],
}
MATRIX_CUTS = {
    16: [(16, 16, 128, 2, 256, 2, 3), (16, 32, 128, 2, 256, 1, 2)],
    32: [(32, 16, 128, 2, 256, 1, 2), (32, 8, 128, 2, 256, 2, 3)],
    8: [(8, 16, 128, 2, 512, 2, 4)],
}
WHOLE_CUTS = [(8, 256, 4), (8, 256, 8), (8, 256, 2)]
WHOLE_COUNTS = (64, 128, 256)  # rows of the plain matmul that follows
FEW_CUTS = {
    4: [(16, 128, 4, 2)],
    2: [(16, 32, 4, 2)],
}  # outputs, lanes, channels ahead, blocks

Calls = Callable[[int], mx.array]


def rows(*shape: int) -> Iterator[dict]:
    """Microseconds of 2 to 512 rows: stock and each way of ours in turns, and `half`, each row half active.

    `chosen` is what spqt takes after its own timing, `ratio` stock's time through that one's.
    """
    kind = ways.Kind(mx.float16, 4, 64)
    choice = ways.choice_for(kind, many.WAYS)
    print(f"spqt's own timing: {choice.words()}")
    yield {"choice": choice._asdict()}
    for outputs, inputs in [shape] if shape else ROWS_SHAPES:
        layers = layers_of(outputs, inputs, 1.0)
        bases = [row_grouped(outputs, inputs) for _ in layers]
        mx.eval(bases)
        for count in FEW_TO_MANY:
            row = rows_at(count, layers, bases)
            row["chosen"] = choice.ways[next(i for i, most in enumerate(ways.COUNTS) if count <= most)]
            row["ratio"] = round(row["stock"]["us"] / row[row["chosen"]]["us"], 3)
            times = " | ".join(f"{way} {row[way]['us']:8.1f}" for way in (*ways.NAMES, "half") if way in row)
            words = f"stock {row['stock']['us']:8.1f} | {times} | {row['chosen']} {row['ratio']:.2f}x"
            print(f"{outputs}x{inputs} rows {count:4} | {words}", flush=True)
            yield row


def rows_at(count: int, layers: list[Packed], bases: list[tuple]) -> dict:
    """One row of the table of `rows`."""
    outputs, inputs = layers[0].outputs, layers[0].weight.shape[1]
    xs = rows_of(count, inputs)
    number = len(layers)
    calls: dict[str, Calls] = {"stock": partial(stock_call, xs, bases)}
    for way in ways.NAMES:
        if ways.is_possible(way, count, mx.float16):
            calls[way] = lambda i, way=way: many.WAYS[way](xs[i % 4], layers[i % number])
    times = in_turns(calls)
    if count <= SPARSE_ROWS:
        set_density(layers, 0.5)
        times |= in_turns({"half": lambda i: gpu.sparse_rows(xs[i % 4], [layers[i % number]])[0][0]})
        set_density(layers, 1.0)
    return {"shape": [outputs, inputs], "rows": count, **times}


def in_turns(
    calls: dict[str, Calls], number: int = ROWS_CALLS, repeats: int = ROWS_REPEATS
) -> dict[str, dict]:
    """Microseconds per call of each, evaluation alone: medians of repeats that take turns."""
    many.MOST_UNFREED = 1 << 40  # nothing is evaluated before its time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            some = LARGE_CALLS if name == "dequantized" else number
            results = [call(i) for i in range(some)]
            mx.synchronize()
            start = time.perf_counter()
            mx.eval(results)
            mx.synchronize()
            if repeat > 0:
                times[name].append((time.perf_counter() - start) / some * 1e6)
    kinds = {"us": statistics.median, "us_min": min, "us_max": max}
    return {name: {kind: round(of(some), 2) for kind, of in kinds.items()} for name, some in times.items()}


def rows_sweep(*shape: int) -> Iterator[dict]:
    """Microseconds of cuts of the kernels for more than one row; stock's are in `rows`.

    What pays goes into `geometry.GEMM_ROWS`, `MANY_ROWS`, `WHOLE` and `FEW_ROWS`. Ends after SWEEP_SECONDS.
    """
    began = time.perf_counter()
    checks.rows_verdict = lambda *_, **__: ""
    shapes = [(shape[0], shape[1])] if shape else ROWS_SHAPES
    some = {(outputs, inputs): layers_of(outputs, inputs, 1.0) for outputs, inputs in shapes}
    for what, of_kernel in sweeps(some):
        found: list[dict] = []
        for measure in of_kernel:
            if time.perf_counter() - began < SWEEP_SECONDS:
                measured = measure()
                found += measured
                yield from measured
        for outputs, inputs in some:
            print(f"{outputs}x{inputs}, {what}")
            own = [row for row in found if row["shape"] == [outputs, inputs]]
            for row in sorted(own, key=lambda one: one.get("us", 1e9))[:5]:
                print(f"  {row.get('us', 0):8.1f} us  {row['cut']}", flush=True)


def rows_chain() -> Iterator[dict]:
    """Microseconds of pairs of products, each of which waits for the other's result, as a model's do.

    Stock in turns with cuts of ours: other tiles, and other shares of the GPU filled.
    """
    checks.rows_verdict = lambda *_, **__: ""
    some = [layers_of(*shape, 1.0) for shape in CHAINED]
    bases = [[row_grouped(*shape) for _ in layers] for shape, layers in zip(CHAINED, some, strict=True)]
    mx.eval(bases)
    for count in CHAINED_COUNTS:
        xs = rows_of(count, CHAINED[0][1])
        calls: dict[str, Calls] = {"stock": partial(chained_stock, xs, bases)}
        for k, cut in enumerate(chained_cuts(count)):
            for fill in FILLS:
                plans = [
                    [
                        more_rows.make_plan(mx.float16, [layer], striped(cut, shape, count, fill), dense=True)
                        for layer in layers
                    ]
                    for shape, layers in zip(CHAINED, some, strict=True)
                ]
                calls[f"{k}, {fill}"] = partial(chained, xs, plans)
        times = in_turns(calls, 1, SWEEP_REPEATS)
        pairs = {
            name: {kind: round(us / LINKS, 2) for kind, us in time.items()} for name, time in times.items()
        }
        words = ", ".join(f"{name}: {pair['us']:.1f}" for name, pair in pairs.items())
        print(f"{count} rows, a pair: {words} us", flush=True)
        yield {
            "shapes": CHAINED,
            "rows": count,
            "cuts": [cut._asdict() for cut in chained_cuts(count)],
            **pairs,
        }


def chained_cuts(count: int) -> list[Any]:
    """Tiles of this many rows, which of them spqt takes first."""
    if count in FEW_CUTS:
        return [few_cut(count, *cut) for cut in FEW_CUTS[count]]
    if count < geometry.LEAST_GEMM:
        return matrix_cuts(count)
    return [geometry.GemmGeometry(*cut, 0) for tokens in GEMM_CUTS for cut in GEMM_CUTS[tokens]]


def striped(cut: Any, shape: tuple[int, int], count: int, fill: float) -> Any:
    """The cut with as many stripes as fill so much of the GPU."""
    outputs, inputs = shape
    band = layout.band_of(outputs, 64)
    tiles = cut.tiles(band) * (outputs // band) * -(-count // cut.tokens)
    step = cut.span if isinstance(cut, geometry.GemmGeometry) else geometry.STEP
    number = max(1, min(inputs // (4 * step), round(fill * geometry.MULTIPROCESSORS * cut.blocks / tiles)))
    return cut._replace(stripe=-(-inputs // (number * step)) * step)


def chained_stock(xs: list[mx.array], bases: list[list[tuple]], i: int) -> mx.array:
    x = xs[i % len(xs)]
    for k in range(LINKS):
        for some in bases:
            x = mx.quantized_matmul(x, *some[k % len(some)], transpose=True, group_size=64, bits=4)
    return x


def chained(xs: list[mx.array], plans: list[list[more_rows.RowsPlan]], i: int) -> mx.array:
    x = xs[i % len(xs)]
    for k in range(LINKS):
        for some in plans:
            x = more_rows.launch(x, some[k % len(some)])[0][0]
    return x


Measure = Callable[[], list[dict]]
Matrices = dict[tuple[int, int], list[Packed]]


def sweeps(some: Matrices) -> Iterator[tuple[str, list[Measure]]]:
    """What is swept, and for each cut a call that measures it at every shape."""
    gemm = {count: [geometry.GemmGeometry(*cut, 0) for cut in cuts] for count, cuts in GEMM_CUTS.items()}
    yield "64 rows", [partial(swept, cut, 64, some) for cut in gemm[64]]
    yield "128 rows", [partial(swept, cut, 128, some) for cut in (*gemm[128], gemm[64][0])]
    yield "16 rows", [partial(swept, cut, 16, some) for cut in (*matrix_cuts(16), gemm[32][0])]
    yield "32 rows", [partial(swept, cut, 32, some) for cut in (*matrix_cuts(32), gemm[32][0])]
    yield "256 rows", [partial(swept, cut, 256, some) for cut in gemm[128]]
    cuts = [geometry.WholeGeometry(*cut) for cut in WHOLE_CUTS]
    yield "dequantized", [partial(unpacked, cuts[0], count, some) for count in WHOLE_COUNTS]
    yield "whole", [partial(unpacked, cut, 0, some) for cut in cuts]
    yield "8 rows", [partial(swept, cut, 8, some) for cut in (*matrix_cuts(8), gemm[32][0])]
    for count, few in FEW_CUTS.items():
        yield f"{count} rows", [partial(swept, few_cut(count, *cut), count, some) for cut in few]


def matrix_cuts(count: int) -> list[geometry.MatrixGeometry]:
    return [geometry.MatrixGeometry(*cut, 0) for cut in MATRIX_CUTS[count]]


def few_cut(count: int, outputs: int, lanes: int, unroll: int, blocks: int) -> geometry.RowsGeometry:
    listed = geometry.FEW_LISTED // 4
    return geometry.RowsGeometry(count, outputs, lanes, 256 // lanes, unroll, listed, 8, 2, 0, blocks)


def stock_call(xs: list[mx.array], bases: list[tuple], i: int) -> mx.array:
    """The i-th of calls that take turns at x and weights."""
    base = bases[i % len(bases)]
    return mx.quantized_matmul(xs[i % len(xs)], *base, transpose=True, group_size=64, bits=4)


def rows_of(count: int, inputs: int) -> list[mx.array]:
    xs = [mx.random.normal((1, count, inputs)).astype(mx.float16) for _ in range(4)]
    mx.eval(xs)
    return xs


def swept(cut: Any, count: int, some: Matrices) -> list[dict]:
    """The times of a cut at every shape, with stripes that fill the GPU once and more often."""
    found = []
    for shape, layers in some.items():
        inputs = shape[1]
        xs = rows_of(count, inputs)
        band = layers[0].weight.shape[2] * 8
        tiles = cut.tiles(band) * layers[0].weight.shape[0] * -(-count // cut.tokens)
        step = cut.span if isinstance(cut, geometry.GemmGeometry) else geometry.STEP
        most = inputs // (4 * step)  # stripes
        for number in stripes_of(cut, tiles, most):
            fitted = cut._replace(stripe=-(-inputs // (number * step)) * step)
            row = {"shape": list(shape), "rows": count, "cut": fitted._asdict(), "stripes": number}
            try:
                plans = [more_rows.make_plan(mx.float16, [layer], fitted, dense=True) for layer in layers]
                calls = {"us": partial(planned_call, xs, plans)}
                found.append(row | in_turns(calls, repeats=SWEEP_REPEATS)["us"])
            except RuntimeError as error:
                found.append(row | {"error": str(error)[:500]})
    return found


def stripes_of(cut: Any, tiles: int, most: int) -> list[int]:
    """Numbers of stripes to try. One is a kernel of its own, so only where no more fit."""
    fit = geometry.MULTIPROCESSORS * cut.blocks / tiles  # with which the GPU is full
    if isinstance(cut, geometry.GemmGeometry):
        return sorted({max(1, int(fit)), max(2, int(fit / 2))})
    return sorted({max(2, min(most, round(fill * fit))) for fill in FILLS})


def planned_call(xs: list[mx.array], plans: list[more_rows.RowsPlan], i: int) -> mx.array:
    return more_rows.launch(xs[i % len(xs)], plans[i % len(plans)])[0][0]


def unpacked(cut: geometry.WholeGeometry, count: int, some: Matrices) -> list[dict]:
    """The times of a cut of dequantize.metal at every shape; with a count also those of a product with it."""
    found = []
    for shape, layers in some.items():
        plans = [dequantize.make_plan(mx.float16, layer, cut) for layer in layers]
        row = {"shape": list(shape), "rows": count, "cut": cut._asdict()}
        if count == 0:
            calls = {"us": lambda i, plans=plans: dequantize.whole(plans[i % len(plans)])}
            found.append(row | in_turns(calls, LARGE_CALLS, SWEEP_REPEATS)["us"])
            continue
        xs = rows_of(count, shape[1])
        w = dequantize.whole(plans[0])
        mx.eval(w)
        calls = {
            "us": lambda i, xs=xs, plans=plans: xs[i % len(xs)] @ dequantize.whole(plans[i % len(plans)]),
            "product": lambda i, xs=xs, w=w: xs[i % len(xs)] @ w,
        }
        times = in_turns(calls, LARGE_CALLS, SWEEP_REPEATS)
        found.append(row | times["us"] | {"product_us": times["product"]["us"]})
    return found
