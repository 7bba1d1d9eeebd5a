"""Times the GPU kernels against stock MLX on this machine; the last line is one JSON document.

    python benchmarks/bench_gpu.py shapes              # the table of metal/README.md
    python benchmarks/bench_gpu.py bands 28672 8192    # stored bands
    python benchmarks/bench_gpu.py prefill             # 1 to 8,192 rows, with peak memory
    python benchmarks/bench_gpu.py first-use           # the check of each kernel before it is used
    python benchmarks/bench_gpu.py collector           # collecting in the kernel, and in one of its own
    python benchmarks/bench_gpu.py sweep 14336 4096    # launch geometries
    python benchmarks/bench_gpu.py overhead            # launches that do nothing

Weights rotate, so that no call finds its weights in a cache; all calls of a run are one evaluation.
`spqt doctor --selftest` checks the same kernels.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import gpu_launches
import gpu_sweeps
import mlx.core as mx
from gpu_common import (
    CALLS,
    REPEATS,
    ROOT,
    Packed,
    layers_of,
    once,
    random_packed,
    row_grouped,
    set_density,
    sparse,
    stock,
    timed,
)

from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import geometry
from spqt_cli.format import layout

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


def dequantized(x: mx.array, layer: Packed) -> mx.array:
    gpu.DEQUANTIZE_ROWS = 2
    return gpu.matmul(x, layer)


def about() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": str(mx.device_info().get("device_name", platform.machine())),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "copy_tb_per_s": copy_rate() if mx.default_device() == mx.Device(mx.gpu) else None,
        "calls": CALLS,
        "repeats": REPEATS,
    }


COMMANDS: dict[str, Callable[..., list[dict]]] = {
    "shapes": shapes,
    "bands": bands,
    "prefill": prefill,
    "sweep": gpu_sweeps.sweep,
    "overhead": gpu_sweeps.overhead,
    "first-use": gpu_launches.first_use,
    "collector": gpu_launches.collector,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*COMMANDS, "profile"])
    parser.add_argument("shape", type=int, nargs="*")
    parser.add_argument("--cut", type=int, nargs=8, help="profile with these fields of geometry.Geometry")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.random.seed(0)
    if args.what == "profile":
        gpu_sweeps.use(geometry.Geometry(*args.cut))
        rows = [sparse(layers_of(*args.shape, 0.5), args.shape[1])]
    else:
        rows = COMMANDS[args.what](*args.shape)
    document = {"about": about(), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
