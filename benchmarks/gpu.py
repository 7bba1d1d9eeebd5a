"""Times the GPU kernels against stock MLX on this machine; the last line is one JSON document.

    python -m benchmarks.gpu shapes              # the table of metal/README.md
    python -m benchmarks.gpu bands 28672 8192    # stored bands
    python -m benchmarks.gpu prefill             # 1 to 8,192 rows, with peak memory
    python -m benchmarks.gpu rows                # 2 to 512 rows, each way of ours in turns with stock
    python -m benchmarks.gpu rows-sweep          # cuts of the kernels for more than one row
    python -m benchmarks.gpu rows-chain          # the same, each product waiting for the one before
    python -m benchmarks.gpu first-use           # the check of each kernel before it is used
    python -m benchmarks.gpu collector           # collecting in the kernel, and in one of its own
    python -m benchmarks.gpu sweep 14336 4096    # launch geometries
    python -m benchmarks.gpu overhead            # launches that do nothing
    python -m benchmarks.gpu tokens 100000       # a tiny model decoded twice: NaN, and bits that differ
    python -m benchmarks.gpu tokens-8b           # the same, 1,000 tokens at the shapes of an 8B model

Weights rotate, so that no call finds its weights in a cache; all calls of a run are one evaluation.
`spqt doctor --selftest` checks the same kernels. Runs from a checkout without an installed spqt.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.machine import commit, from_bare_tree

from_bare_tree()
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use as checks
from spqt_cli.backends.gpu import launch, many, plans
from spqt_cli.bench import quiet_host, thousand_tokens
from spqt_cli.bench import shapes as shapes_of
from spqt_cli.format import layout

CALLS = 64  # in one evaluation
REPEATS = 11
ROTATED_BYTES = 400e6  # of weights: several times an H200's 60 MB of L2
HOST = quiet_host.Watch()
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WAYS = ("stock", "zigzag", "dequantize", "gemvs")

GROUPS = [
    ("q/k/v", (4096, 1024, 1024), 4096),
    ("gate/up", (14336, 14336), 4096),
    ("gate/up", (28672, 28672), 8192),
]
SHAPES = [
    (28672, 8192),
    (8192, 28672),
    (8192, 8192),
    (14336, 4096),
    (4096, 14336),
    (4096, 4096),
    (1024, 4096),
]
# Launches of one block of an 8B model: name, outputs of each projection, inputs.
BLOCK = [
    ("q/k/v", (4096, 1024, 1024), 4096),
    ("o", (4096,), 4096),
    ("gate/up", (14336, 14336), 4096),
    ("down", (4096,), 14336),
]
KINDS = {"sparse": False, "dense": True}  # with thresholds, and without


@dataclass
class Packed:
    """A Zigzag matrix as backend.py reads it."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    threshold: mx.array
    outputs: int
    bits: int = 4
    group_size: int = 64

    def get(self, key: str, default: object = None) -> object:
        """As a module's: backend.py sees by it that the weights are still the same ones."""
        return self.__dict__.get(key, default)


def random_packed(outputs: int, inputs: int, band: int, density: float, bits: int = 4) -> Packed:
    """A matrix of random codes; scales and thresholds as a model's would be in size."""
    codes, scales = layout.packed_shapes((outputs, inputs), bits, 64, band)
    threshold = statistics.NormalDist().inv_cdf(1 - density / 2) if density < 1 else 0.0
    return Packed(
        mx.random.randint(0, 2**31 - 1, codes).view(mx.uint32),
        (mx.random.uniform(shape=scales) * 0.01).astype(mx.float16),
        (mx.random.uniform(shape=scales) * -0.08).astype(mx.float16),
        mx.array([threshold]),
        outputs,
        bits,
    )


def timed(build: Callable[[int], list[mx.array]]) -> dict[str, float | None]:
    """Microseconds per call: evaluation (dispatch included) and building the graph in Python.

    us_quiet: the median of the repeats whose host was quiet (`bench.quiet_host`), where two or more were.
    """
    evaluation, building, looks = [], [], []
    for repeat in range(REPEATS + 2):
        before = HOST.look()
        start = time.perf_counter()
        results = [build(i) for i in range(CALLS)]
        built = time.perf_counter()
        mx.eval(results)
        mx.synchronize()
        if repeat >= 2:
            building.append((built - start) / CALLS * 1e6)
            evaluation.append((time.perf_counter() - built) / CALLS * 1e6)
            looks.append((before, HOST.look()))
    quiet = [us for us, near in zip(evaluation, HOST.quiet([looks]), strict=True) if near]
    enough = len(quiet) >= quiet_host.LEAST
    return {
        "us_quiet": round(statistics.median(quiet), 2) if enough else None,
        "quiet": len(quiet),
        "us": round(statistics.median(evaluation), 2),
        "us_min": round(min(evaluation), 2),
        "us_max": round(max(evaluation), 2),
        "host_us": round(statistics.median(building), 2),
    }


def once(call: Callable[[], mx.array]) -> float:
    """Microseconds of a call: the median of a few evaluations of eight."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        mx.eval([call() for _ in range(8)])
        times.append((time.perf_counter() - start) / 8 * 1e6)
    return round(statistics.median(times[1:]), 1)


def stock(outputs: int, inputs: int, bits: int = 4) -> dict[str, float]:
    """mx.quantized_matmul on the row-grouped layout, as an unpatched mlx-lm layer calls it."""
    copies = rotated(outputs, inputs)
    weights = [row_grouped(outputs, inputs, bits) for _ in range(copies)]
    xs = [mx.random.normal((1, 1, inputs)).astype(mx.float16) for _ in range(8)]
    mx.eval(weights, xs)
    return timed(
        lambda i: mx.quantized_matmul(
            xs[i % 8], *weights[i % copies], transpose=True, group_size=64, bits=bits
        )
    )


def row_grouped(outputs: int, inputs: int, bits: int = 4) -> tuple[mx.array, mx.array, mx.array]:
    """Random weight, scales and biases as mx.quantize lays them out."""
    return (
        mx.random.randint(0, 2**31 - 1, (outputs, inputs * bits // 32)).view(mx.uint32),
        (mx.random.uniform(shape=(outputs, inputs // 64)) * 0.01).astype(mx.float16),
        (mx.random.uniform(shape=(outputs, inputs // 64)) * -0.08).astype(mx.float16),
    )


def rotated(outputs: int, inputs: int) -> int:
    return max(2, min(CALLS, int(ROTATED_BYTES / (outputs * inputs * 0.5625)) + 1))


def layers_of(outputs: int, inputs: int, density: float, band: int | None = None) -> list[Packed]:
    band = band or layout.band_of(outputs, 64)
    layers = [random_packed(outputs, inputs, band, density) for _ in range(rotated(outputs, inputs))]
    mx.eval([(one.weight, one.scales, one.biases, one.threshold) for one in layers])
    return layers


def sparse(layers: list[Packed], inputs: int) -> dict[str, float]:
    xs = [mx.random.normal((1, 1, inputs)).astype(mx.float16) for _ in range(8)]
    mx.eval(xs)
    return timed(lambda i: gpu.sparse_gemv(xs[i % 8], [layers[i % len(layers)]])[0][0])


def set_density(layers: list[Packed], density: float) -> None:
    threshold = mx.array(
        [statistics.NormalDist().inv_cdf(1 - density / 2) if 0 < density < 1 else 99.0 * (1 - density)]
    )
    mx.eval(threshold)
    for one in layers:
        one.threshold = threshold


def shapes() -> list[dict]:
    """The rule's own geometry at several densities, beside stock in the same run; then shared inputs."""
    rows = []
    for outputs, inputs in SHAPES:
        row = {
            "shape": [outputs, inputs],
            "band": layout.band_of(outputs, 64),
            "stock": stock(outputs, inputs),
        }
        layers = layers_of(outputs, inputs, 0.5)
        for density in (1.0, 0.5, 0.25, 0.0):
            set_density(layers, density)
            row[str(density)] = sparse(layers, inputs)
        rows.append(row)
        told(row, outputs * inputs * 0.5625)
    for name, group, inputs in GROUPS:
        stacks = [layers_of(outputs, inputs, 0.5) for outputs in group]
        copies = min(len(stack) for stack in stacks)
        row = {"shape": [name, *group, inputs]}
        apart = [stock(outputs, inputs) for outputs in group]
        row["stock"] = {
            key: round(sum(one[key] for one in apart), 2) if all(one[key] for one in apart) else None
            for key in ("us", "us_quiet")
        }
        xs = [mx.random.normal((1, 1, inputs)).astype(mx.float16) for _ in range(8)]
        mx.eval(xs)
        for density in (1.0, 0.5):
            for stack in stacks:
                set_density(stack, density)
            row[str(density)] = timed(
                lambda i, s=stacks, n=copies, x=xs: gpu.sparse_gemv(x[i % 8], [stack[i % n] for stack in s])[
                    0
                ]
            )
        rows.append(row)
        told(row, sum(group) * inputs * 0.5625)
    return rows


def told(row: dict, size: float) -> None:
    base, quiet_base = row["stock"]["us"], row["stock"].get("us_quiet")
    parts = []
    for density in ("1.0", "0.5", "0.25", "0.0"):
        if density in row:
            us, quiet = row[density]["us"], row[density]["us_quiet"]
            rate = float(density) * size / us / 1e6
            on_quiet_host = f"{quiet_base / quiet:.2f}x" if quiet and quiet_base else "n/a"
            parts.append(f"{density}: {us:6.2f} us {base / us:.2f}x, quiet {on_quiet_host} {rate:.2f} TB/s")
    print(f"{row['shape']} stock {base} us | " + " | ".join(parts))


def copy_rate() -> float:
    """TB/s of a large copy, bytes read plus bytes written."""
    x = mx.zeros((2**30,), dtype=mx.float16)
    mx.eval(x)
    us = min(once(lambda: x + 1) for _ in range(3))
    return round(2 * x.nbytes / us / 1e6, 2)


def bands(outputs: int, inputs: int) -> list[dict]:
    """The stored band from 64 outputs to all of them: decode, and 512 rows of prefill."""
    rows = []
    widths = [b for b in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if outputs % b == 0]
    widths += [outputs // n for n in range(1, 9) if outputs % n == 0 and outputs // n % 64 == 0]
    for band in sorted(set(widths)):
        layers = layers_of(outputs, inputs, 0.5, band)
        row = {"shape": [outputs, inputs], "band": band, "half": sparse(layers, inputs)}
        set_density(layers, 1.0)
        row["all"] = sparse(layers, inputs)
        prompt = mx.random.normal((1, 512, inputs)).astype(mx.float16)
        row["prefill"] = once(lambda p=prompt, one=layers[0]: gpu.matmul(p, one))
        rows.append(row)
        times = f"half {row['half']['us']} all {row['all']['us']} prefill {row['prefill']}"
        print(f"{outputs}x{inputs} band {band:5}: {times}")
    return rows


def prefill(*shape: int) -> list[dict]:
    """Many rows at the shapes of an 8B model, or at one shape; with each way's peak memory in MB.

    `stock`: mx.quantized_matmul on the row-grouped layout; `zigzag`: on ours; `dequantize`: once to x's
    dtype, then a plain matmul; `gemvs`: our kernel once a row. Milliseconds.
    """
    shapes = [shape] if shape else [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    rows = []
    for outputs, inputs in shapes:
        layer = random_packed(outputs, inputs, layout.band_of(outputs, 64), 1.0)
        base = row_grouped(outputs, inputs)
        mx.eval(layer.weight, layer.scales, layer.biases, layer.threshold, base)
        for count in ROWS:
            x = mx.random.normal((1, count, inputs)).astype(mx.float16)
            ones = mx.split(x, count, axis=1) if count <= 8 else []
            mx.eval(x, ones)
            row: dict = {"shape": [outputs, inputs], "rows": count}
            for name, call in ways(x, ones, layer, base).items():
                row[name] = {"ms": round(once(call) / 1e3, 4), "peak_mb": peak(call)}
            rows.append(row)
            told_ways = " ".join(
                f"{name} {row[name]['ms']:.3f} ms {row[name]['peak_mb']} MB |" for name in row if name in WAYS
            )
            print(f"{outputs}x{inputs} rows {count:5} | {told_ways}", flush=True)
    return rows


def ways(x: mx.array, ones: list[mx.array], layer: Packed, base: tuple) -> dict[str, Callable[[], mx.array]]:
    """The ways of WAYS to multiply x that there are for so many rows."""
    packed = (layer.weight, layer.scales, layer.biases)
    how = {"outputs": layer.outputs, "bits": 4, "group_size": 64}
    found = {
        "stock": lambda: mx.quantized_matmul(x, *base, transpose=True, group_size=64, bits=4),
        "zigzag": lambda: layout.matmul(x, *packed, **how),
    }
    if x.shape[1] > 1:
        found["dequantize"] = lambda: dequantized(x, layer)
    if ones:
        found["gemvs"] = lambda: mx.concatenate([gpu.matmul(one, layer) for one in ones], axis=1)
    return found


def peak(call: Callable[[], mx.array]) -> float:
    """Megabytes that one call takes on top of what is there, its result included."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call())
    return round((mx.get_peak_memory() - before) / 1e6, 1)


def rows(*shape: int) -> Iterable[dict]:
    """2 to 512 rows, each way of ours in turns with stock: benchmarks/gpu_rows.py."""
    from benchmarks import gpu_rows

    return gpu_rows.rows(*shape)


def rows_sweep(*shape: int) -> Iterable[dict]:
    """Cuts of the kernels for more than one row: benchmarks/gpu_rows.py."""
    from benchmarks import gpu_rows

    return gpu_rows.rows_sweep(*shape)


def rows_chain() -> Iterable[dict]:
    """Products of more than one row that wait for one another: benchmarks/gpu_rows.py."""
    from benchmarks import gpu_rows

    return gpu_rows.rows_chain()


def dequantized(x: mx.array, layer: Packed) -> mx.array:
    return many.WAYS["dequantized"](x, layer)


def sweep(outputs: int, inputs: int) -> Iterable[dict]:
    """Cuts of the kernel for one row: benchmarks/gpu_launches.py."""
    from benchmarks import gpu_launches

    return gpu_launches.sweep(outputs, inputs)


def overhead() -> Iterable[dict]:
    """What a launch costs by itself: benchmarks/gpu_launches.py."""
    from benchmarks import gpu_launches

    return gpu_launches.overhead()


def collector() -> Iterable[dict]:
    """What collecting costs: benchmarks/gpu_launches.py."""
    from benchmarks import gpu_launches

    return gpu_launches.collector()


def first_use() -> list[dict[str, Any]]:
    """Seconds of the check of every variant that an 8B model needs, in three states of this process.

    `compiling`: nothing known, so each kernel is compiled; `checking`: compiled in this process, but no
    passed check remembered; `remembered`: the check has passed before.
    """
    groups = [
        (name, [random_packed(outputs, inputs, layout.band_of(outputs, 64), 0.5) for outputs in group])
        for name, group, inputs in BLOCK
    ]
    mx.eval([(one.weight, one.scales, one.biases, one.threshold) for _, layers in groups for one in layers])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what this machine remembers of earlier runs does not count
        for state in ("compiling", "checking", "remembered"):
            if state != "remembered":
                checks._passed.cache_clear()
                checks._file().unlink(missing_ok=True)
            rows += [checked(state, *group, kind) for group in groups for kind in KINDS]
            total = sum(row["seconds"] for row in rows if row["state"] == state)
            print(f"{state}: {total:.3f} s for {len(KINDS) * len(groups)} variants")
    return rows


def checked(state: str, name: str, layers: list[Packed], kind: str) -> dict[str, Any]:
    """One verdict, timed. Ends the program where a kernel is not right: its time would say nothing."""
    began = time.perf_counter()
    cut, form = plans.choose(layers, mx.float16), launch.Form(KINDS[kind])
    plan = launch.make_plan((1, 1, layers[0].weight.shape[1]), mx.float16, layers, cut, form)
    reason = checks.verdict(plan, mx.float16, layers, cut)
    seconds = time.perf_counter() - began
    if reason:
        raise SystemExit(f"{name}: {reason}")
    print(f"  {state:10} {name:8} {kind:8} {seconds:.3f} s")
    return {"state": state, "launch": name, "kind": kind, "seconds": round(seconds, 4)}


def tokens(count: int = 100_000) -> Iterable[dict]:
    """Many times the self-test's thousand tokens; prints each row."""
    each = thousand_tokens.TOKENS
    yield from printed(thousand_tokens.rows(each, max(1, count // each)))


def tokens_8b() -> Iterable[dict]:
    """The self-test's tokens at the shapes of an 8B model."""
    yield from printed(thousand_tokens.rows(config=shapes_of.config("llama-3-8b")))


def printed(rows: Iterable[dict]) -> Iterable[dict]:
    for row in rows:
        print(row)
        yield row


def about() -> dict:
    return {
        "device": str(mx.device_info().get("device_name", platform.machine())),
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "commit": commit(),
        "copy_tb_per_s": copy_rate() if mx.default_device() == mx.Device(mx.gpu) else None,
        "calls": CALLS,
        "repeats": REPEATS,
    }


COMMANDS: dict[str, Callable[..., Iterable[dict]]] = {
    "shapes": shapes,
    "bands": bands,
    "prefill": prefill,
    "rows": rows,
    "rows-sweep": rows_sweep,
    "rows-chain": rows_chain,
    "sweep": sweep,
    "overhead": overhead,
    "tokens": tokens,
    "tokens-8b": tokens_8b,
    "first-use": first_use,
    "collector": collector,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("shape", type=int, nargs="*")
    parser.add_argument("--output", "--out", type=Path, help="file for the JSON document")
    args = parser.parse_args()
    mx.random.seed(0)
    found: list[dict] = []
    document = {"about": about(), "rows": found}
    for row in COMMANDS[args.what](*args.shape):
        found.append(row)
        if args.output:  # now: a run that is cut off keeps what it has
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
