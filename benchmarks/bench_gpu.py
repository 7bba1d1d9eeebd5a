"""Times the GPU kernels against stock MLX on this machine; the last line is one JSON document.

    python benchmarks/bench_gpu.py shapes              # the table of metal/README.md
    python benchmarks/bench_gpu.py bands 28672 8192    # stored bands
    python benchmarks/bench_gpu.py prefill 14336 4096  # many rows
    python benchmarks/bench_gpu.py sweep 14336 4096    # launch geometries
    python benchmarks/bench_gpu.py overhead            # launches that do nothing

Weights rotate, so that no call finds its weights in a cache; all calls of a run are one evaluation.
`spqt doctor --selftest` checks the same kernels.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import gpu_sweeps
import mlx.core as mx
from gpu_common import CALLS, REPEATS, ROOT, Packed, layers_of, once, set_density, sparse, stock, timed

from spqt_cli import geometry, gpu, layout

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
        times = [stock(outputs, inputs)["us"] for outputs in group]
        row["stock"] = {"us": round(sum(times), 2)}
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
    base = row["stock"]["us"]
    parts = []
    for density in ("1.0", "0.5", "0.25", "0.0"):
        if density in row:
            us = row[density]["us"]
            rate = float(density) * size / us / 1e6
            parts.append(f"{density}: {us:6.2f} us {base / us:.2f}x {rate:.2f} TB/s")
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


def prefill(outputs: int, inputs: int) -> list[dict]:
    """Many rows: MLX's own matmul on the Zigzag layout, dequantize and matmul, and the row-grouped one."""
    (layer,) = layers_of(outputs, inputs, 0.5)[:1]
    base = (
        mx.random.randint(0, 2**31 - 1, (outputs, inputs // 8)).view(mx.uint32),
        mx.random.uniform(shape=(outputs, inputs // 64)).astype(mx.float16),
        mx.random.uniform(shape=(outputs, inputs // 64)).astype(mx.float16),
    )
    packed = (layer.weight, layer.scales, layer.biases)
    how = {"outputs": outputs, "bits": 4, "group_size": 64}
    rows = []
    for count in (512, 8, 32, 128, 2048, 2, 4):
        x = mx.random.normal((1, count, inputs)).astype(mx.float16)
        ones = mx.split(x, count, axis=1) if count <= 8 else []
        mx.eval(x, ones, base)
        row = {
            "shape": [outputs, inputs],
            "rows": count,
            "stock": once(lambda x=x: mx.quantized_matmul(x, *base, transpose=True, group_size=64, bits=4)),
            "zigzag": once(lambda x=x: layout.matmul(x, *packed, **how)),
            "dequantize": once(lambda x=x: dequantized(x, layer)),
            "gemvs": once(lambda o=ones: mx.concatenate([gpu.sparse_gemv(i, [layer])[0][0] for i in o], 1))
            if ones
            else None,
        }
        rows.append(row)
        print(row)
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["shapes", "bands", "prefill", "sweep", "profile", "overhead"])
    parser.add_argument("shape", type=int, nargs="*")
    parser.add_argument("--cut", type=int, nargs=8, help="profile with these fields of geometry.Geometry")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.random.seed(0)
    if args.what == "profile":
        gpu_sweeps.use(geometry.Geometry(*args.cut))
        rows = [sparse(layers_of(*args.shape, 0.5), args.shape[1])]
    else:
        commands = {"bands": bands, "prefill": prefill, "sweep": gpu_sweeps.sweep}
        commands |= {"shapes": shapes, "overhead": gpu_sweeps.overhead}
        rows = commands[args.what](*args.shape)
    document = {"about": about(), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
