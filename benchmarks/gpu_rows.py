"""More than one row on a GPU: each way of ours in turns with stock MLX, and other cuts of the kernels.

    python -m benchmarks.gpu rows [OUTPUTS INPUTS] --output OUT
    python -m benchmarks.gpu rows-sweep [OUTPUTS INPUTS] --output OUT

benchmarks/gpu.py says what a measurement is, and makes the matrices.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from benchmarks.gpu import Packed, layers_of, row_grouped, set_density
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use as checks
from spqt_cli.backends.gpu import geometry, launch, ways
from spqt_cli.backends.gpu import rows as more_rows

FEW_TO_MANY = (2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROWS_SHAPES = [(14336, 4096), (4096, 14336), (28672, 8192)]
ROWS_CALLS, ROWS_REPEATS = 24, 9
LARGE_CALLS = 6  # where each call makes a whole matrix anew
SPARSE_ROWS = 8  # up to which the masked product is timed as well
SWEEP_SECONDS = 500.0

Calls = Callable[[int], mx.array]


def rows(*shape: int) -> list[dict]:
    """Microseconds of 2 to 512 rows: stock and each way of ours in turns, and `half`, each row half active.

    `chosen` is what spqt takes after its own timing, `ratio` stock's time through that one's.
    """
    found: list[dict] = []
    kind = ways.Kind(mx.float16, 4, 64)
    choice = ways.choice_for(kind, gpu.WAYS)
    print(f"spqt's own timing: {choice.words()}")
    found.append({"choice": choice._asdict()})
    for outputs, inputs in [shape] if shape else ROWS_SHAPES:
        layers = layers_of(outputs, inputs, 1.0)
        bases = [row_grouped(outputs, inputs) for _ in layers]
        mx.eval(bases)
        for count in FEW_TO_MANY:
            row = rows_at(count, layers, bases)
            row["chosen"] = choice.ways[next(i for i, most in enumerate(ways.COUNTS) if count <= most)]
            row["ratio"] = round(row["stock"]["us"] / row[row["chosen"]]["us"], 3)
            found.append(row)
            times = " | ".join(f"{way} {row[way]['us']:8.1f}" for way in (*ways.NAMES, "half") if way in row)
            words = f"stock {row['stock']['us']:8.1f} | {times} | {row['chosen']} {row['ratio']:.2f}x"
            print(f"{outputs}x{inputs} rows {count:4} | {words}", flush=True)
    return found


def rows_at(count: int, layers: list[Packed], bases: list[tuple]) -> dict:
    """One row of the table of `rows`."""
    outputs, inputs = layers[0].outputs, layers[0].weight.shape[1]
    xs = [mx.random.normal((1, count, inputs)).astype(mx.float16) for _ in range(4)]
    mx.eval(xs)
    number = len(layers)
    calls: dict[str, Calls] = {
        "stock": lambda i: mx.quantized_matmul(
            xs[i % 4], *bases[i % number], transpose=True, group_size=64, bits=4
        )
    }
    for way in ways.NAMES:
        if ways.is_possible(way, count, mx.float16):
            calls[way] = lambda i, way=way: gpu.WAYS[way](xs[i % 4], layers[i % number])
    times = in_turns(calls)
    if count <= SPARSE_ROWS:
        set_density(layers, 0.5)
        times |= in_turns({"half": lambda i: gpu.sparse_rows(xs[i % 4], [layers[i % number]])[0][0]})
        set_density(layers, 1.0)
    return {"shape": [outputs, inputs], "rows": count, **times}


def in_turns(calls: dict[str, Calls]) -> dict[str, dict]:
    """Microseconds per call of each, evaluation alone: medians of repeats that take turns."""
    gpu.MOST_UNFREED = 1 << 40  # nothing is evaluated before its time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(ROWS_REPEATS + 1):
        for name, call in calls.items():
            number = LARGE_CALLS if name == "dequantized" else ROWS_CALLS
            results = [call(i) for i in range(number)]
            mx.synchronize()
            start = time.perf_counter()
            mx.eval(results)
            mx.synchronize()
            if repeat > 0:
                times[name].append((time.perf_counter() - start) / number * 1e6)
    kinds = {"us": statistics.median, "us_min": min, "us_max": max}
    return {name: {kind: round(of(some), 2) for kind, of in kinds.items()} for name, some in times.items()}


def rows_sweep(*shape: int) -> list[dict]:
    """Microseconds of other cuts of sparse_rows.metal and matrix_rows.metal, the best first, beside stock.

    What pays goes into `geometry.FEW_ROWS` and `MANY_ROWS`. Ends after SWEEP_SECONDS.
    """
    began = time.perf_counter()
    checks.rows_verdict = lambda *_, **__: ""
    found: list[dict] = []
    for outputs, inputs in [shape] if shape else [(28672, 8192), (4096, 14336)]:
        layers = layers_of(outputs, inputs, 1.0)
        bases = [row_grouped(outputs, inputs) for _ in layers]
        mx.eval(bases)
        for count in (8, 4, 2, 16, 64, 32, 256):
            some = few_cuts(layers, count) if count <= SPARSE_ROWS else matrix_cuts(layers, count)
            done = []
            for cut in some:
                if time.perf_counter() - began < SWEEP_SECONDS:
                    done.append(swept(cut, count, layers, bases))
            found += done
            print(f"{outputs}x{inputs}, {count} rows")
            for row in sorted(done, key=lambda one: one.get("us", 1e9))[:6]:
                print(
                    f"  {row.get('us', 0):8.1f} us, stock {row.get('stock', 0):8.1f}  {row['cut']}",
                    flush=True,
                )
    return found


def swept(cut: Any, count: int, layers: list[Packed], bases: list[tuple]) -> dict:
    """The time of a cut, and of stock in turns with it."""
    inputs = layers[0].weight.shape[1]
    row: dict = {"shape": [layers[0].outputs, inputs], "rows": count, "cut": cut._asdict()}
    xs = [mx.random.normal((1, count, inputs)).astype(mx.float16) for _ in range(4)]
    number = len(layers)
    try:
        plans = [more_rows.make_plan(mx.float16, [layer], cut, dense=True) for layer in layers]
        calls: dict[str, Calls] = {
            "us": lambda i: more_rows.launch(xs[i % 4], plans[i % number])[0][0],
            "stock": lambda i: mx.quantized_matmul(
                xs[i % 4], *bases[i % number], transpose=True, group_size=64, bits=4
            ),
        }
        return row | {name: one["us"] for name, one in in_turns(calls).items()}
    except RuntimeError as error:
        return row | {"error": str(error)[:500]}


def few_cuts(layers: list[Packed], count: int) -> list[Any]:
    """Cuts of sparse_rows.metal around the rule's."""
    bands, inputs = launch.bands(layers[:1]), layers[0].weight.shape[1]
    rule = geometry.choose_rows(gpu.device_class(), bands, inputs, count)
    cuts = [rule]
    choices = [(8, 4), (8, 8), (16, 2), (16, 4), (32, 2)]
    fills = [(1, 132), (2, 264)]  # blocks that an SM holds, threadgroups aimed at
    for (wide, unroll), lanes, (blocks, groups) in itertools.product(choices, (32, 128), fills):
        if wide * rule.tokens <= 128 and not (wide * rule.tokens == 128 and blocks > 1):
            tiles = sum(-(-band // (lanes * wide)) * number for band, number in bands)
            stripe = -(-inputs // max(1, groups // tiles))
            cut = rule._replace(outputs=wide, unroll=unroll, lanes=lanes, rows=256 // lanes, blocks=blocks)
            cuts.append(cut._replace(stripe=stripe, slice=min(8, wide)))
    return cuts


def matrix_cuts(layers: list[Packed], count: int) -> list[Any]:
    """Cuts of matrix_rows.metal around the rule's."""
    bands, inputs = launch.bands(layers[:1]), layers[0].weight.shape[1]
    rule = geometry.choose_matrix(gpu.device_class(), bands, inputs, count)
    cuts = [rule]
    for (threads, blocks), unroll, groups in itertools.product(
        [(128, 2), (128, 3), (128, 4), (256, 1), (256, 2)], (1, 2), (132, 264)
    ):
        fits = blocks * threads * (96 + 2 * rule.tokens) <= 65536  # registers, roughly
        if fits:
            cut = rule._replace(threads=threads, unroll=unroll, blocks=blocks)
            tiles = sum(cut.tiles(band) * number for band, number in bands) * -(-count // rule.tokens)
            cuts.append(cut._replace(stripe=-(-inputs // max(1, min(groups // tiles, inputs // 256)))))
    return list(dict.fromkeys(cuts))
