"""Checks and times the GPU kernels against stock MLX on this machine; the last line is one JSON document.

    python benchmarks/bench_gpu.py check            # every variant against float64
    python benchmarks/bench_gpu.py shapes           # the table of metal/README.md
    python benchmarks/bench_gpu.py sweep 14336 4096 # launch geometries
    python benchmarks/bench_gpu.py bands            # stored bands

Weights rotate, so that no call finds its weights in a cache; all calls of a run are one evaluation.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CALLS = 64  # in one evaluation
REPEATS = 7
ROTATED_BYTES = 400e6  # of weights: several times an H200's 60 MB of L2
SHAPES = [(28672, 8192), (8192, 28672), (8192, 8192), (14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)]


def from_bare_tree() -> None:
    """Makes an uninstalled checkout importable: the kernel bodies lie beside the package there."""
    sys.path.insert(0, str(ROOT))
    link = ROOT / "spqt_cli" / "metal"
    try:
        import spqt_cli.metal  # noqa: F401
    except ModuleNotFoundError:
        link.symlink_to(Path("..") / "metal")


from_bare_tree()
from spqt_cli import geometry, gpu, layout  # noqa: E402


@dataclass
class Packed:
    """A Zigzag matrix as gpu.py reads it."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    threshold: mx.array
    outputs: int
    bits: int = 4
    group_size: int = 64
    more: dict = field(default_factory=dict)

    def get(self, key: str, default: object = None) -> object:
        return self.more.get(key, default)


def random_packed(outputs: int, inputs: int, band: int, density: float, bits: int = 4) -> Packed:
    """A matrix of random codes; scales and thresholds as a model's would be in size."""
    codes, scales = layout.packed_shapes(outputs, inputs, bits, 64, band)
    threshold = statistics.NormalDist().inv_cdf(1 - density / 2) if density < 1 else 0.0
    return Packed(
        mx.random.randint(0, 2**31 - 1, codes).view(mx.uint32),
        (mx.random.uniform(shape=scales) * 0.01).astype(mx.float16),
        (mx.random.uniform(shape=scales) * -0.08).astype(mx.float16),
        mx.array([threshold]),
        outputs,
        bits,
    )


def timed(build: Callable[[int], list[mx.array]]) -> dict[str, float]:
    """Microseconds per call: evaluation (dispatch included) and building the graph in Python."""
    evaluation, building = [], []
    for repeat in range(REPEATS + 2):
        start = time.perf_counter()
        results = [build(i) for i in range(CALLS)]
        built = time.perf_counter()
        mx.eval(results)
        mx.synchronize()
        if repeat >= 2:
            building.append((built - start) / CALLS * 1e6)
            evaluation.append((time.perf_counter() - built) / CALLS * 1e6)
    return {
        "us": round(statistics.median(evaluation), 2),
        "us_min": round(min(evaluation), 2),
        "us_max": round(max(evaluation), 2),
        "host_us": round(statistics.median(building), 2),
    }


def stock(outputs: int, inputs: int, bits: int = 4) -> dict[str, float]:
    """mx.quantized_matmul on the row-grouped layout, as an unpatched mlx-lm layer calls it."""
    copies = rotated(outputs, inputs)
    weights = [
        (
            mx.random.randint(0, 2**31 - 1, (outputs, inputs * bits // 32)).view(mx.uint32),
            (mx.random.uniform(shape=(outputs, inputs // 64)) * 0.01).astype(mx.float16),
            (mx.random.uniform(shape=(outputs, inputs // 64)) * -0.08).astype(mx.float16),
        )
        for _ in range(copies)
    ]
    xs = [mx.random.normal((1, 1, inputs)).astype(mx.float16) for _ in range(8)]
    mx.eval(weights, xs)
    return timed(
        lambda i: mx.quantized_matmul(
            xs[i % 8], *weights[i % copies], transpose=True, group_size=64, bits=bits
        )
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
    threshold = mx.array([statistics.NormalDist().inv_cdf(1 - density / 2) if 0 < density < 1 else 99.0 * (1 - density)])
    mx.eval(threshold)
    for one in layers:
        one.threshold = threshold


def use(cut: geometry.Geometry) -> None:
    """Launches with this geometry instead of the rule's."""
    geometry.choose = lambda *_: cut


def relative_error(got: mx.array, layer: Packed, x: mx.array) -> float:
    """Largest error against float64, as a share of the sum of the terms' sizes."""
    dense = layout.dequantize(
        layer.weight, layer.scales, layer.biases, outputs=layer.outputs, bits=layer.bits,
        group_size=layer.group_size,
    )  # fmt: skip
    w = np.array(dense.astype(mx.float32), dtype=np.float64)
    masked = np.array(layout.mask(x, layer.threshold).astype(mx.float32), dtype=np.float64).ravel()
    y, size = w @ masked, np.abs(w) @ np.abs(masked)
    return float((np.abs(np.array(got.astype(mx.float32)).ravel() - y) / np.maximum(size, 1e-30)).max())


def check(decodes: tuple[int, ...]) -> list[dict]:
    rule = geometry.choose
    rows = []
    for bits, group, dtype, decode in itertools.product(
        layout.BITS, layout.GROUP_SIZES, (mx.float16, mx.bfloat16, mx.float32), decodes
    ):
        if (group != 64 or dtype != mx.float16) and (bits not in (3, 4) or decode != decodes[0]):
            continue
        geometry.choose = lambda *a, d=decode: rule(*a)._replace(decode=d)
        for outputs, inputs in ((1000, 777), (2752 * 2, 300)):
            w = (mx.random.normal((outputs, inputs)) * 0.1).astype(dtype)
            band = layout.band_of(outputs, group)
            packed = layout.quantize(w, bits, group, band)
            x = mx.random.normal((1, 1, inputs)).astype(dtype)
            for threshold in (0.0, 0.67, 2.0, 99.0):
                layer = Packed(*packed, mx.array([threshold]), outputs, bits, group)
                (y,), active = gpu.sparse_gemv(x, [layer])
                (again,), _ = gpu.sparse_gemv(x, [layer])
                want = int((~layout.inactive(x, layer.threshold)).sum().item())
                rows.append(
                    {
                        "bits": bits, "group": group, "dtype": str(dtype), "decode": decode,
                        "shape": [outputs, inputs], "active": int(active.item()), "want": want,
                        "error": relative_error(y, layer, x), "same": bool(mx.array_equal(y, again).item()),
                    }
                )  # fmt: skip
    geometry.choose = rule
    limit = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}
    bad = [
        row
        for row in rows
        if row["active"] != row["want"]
        or not row["same"]
        or not row["error"] < limit[row["dtype"].rsplit(".", maxsplit=1)[-1]]
    ]
    print(f"check: {len(rows)} cases, {len(bad)} bad")
    for row in bad[:10]:
        print("  ", row)
    return rows


def sweep(outputs: int, inputs: int, cuts: list[geometry.Geometry], density: tuple[float, ...]) -> list[dict]:
    base = stock(outputs, inputs)
    print(f"\n{outputs}x{inputs}: stock {base['us']} us")
    layers = layers_of(outputs, inputs, 0.5)
    rows = [{"shape": [outputs, inputs], "stock": base}]
    for cut in cuts:
        use(cut)
        row = {"shape": [outputs, inputs], "cut": cut._asdict()}
        for d in density:
            set_density(layers, d)
            for one in layers:
                one.__dict__.pop("_gpu_plans", None)
            try:
                row[str(d)] = sparse(layers, inputs)["us"]
            except RuntimeError as error:
                row["error"] = str(error)[:2000]
                print(row["error"])
                break
        rows.append(row)
    done = [row for row in rows[1:] if "error" not in row]
    for row in sorted(done, key=lambda r: r[str(density[0])])[:12]:
        cut = geometry.Geometry(**row["cut"])
        times = "  ".join(f"{d}: {row[str(d)]:7.2f} ({base['us'] / row[str(d)]:.2f}x)" for d in density)
        print(
            f"  lanes {cut.lanes:3} rows {cut.rows:3} unroll {cut.unroll} decode {cut.decode} list {cut.list:4}"
            f" slice {cut.slice} stripe {cut.stripe:5}  {times}"
        )
    return rows


def cut_of(lanes: int, threads: int, unroll: int, inputs: int, stripes: int, **more: int) -> geometry.Geometry:
    stripe = -(-inputs // stripes)
    most = min(32, more.pop("most", 8192) // threads)
    collected = threads * max(1, min(most, -(-stripe // threads)))
    settings = {"slice": 8, "decode": 2, **more}
    return geometry.Geometry(lanes, threads // lanes, unroll, collected, stripe=stripe, **settings)


def candidates(outputs: int, inputs: int) -> list[geometry.Geometry]:
    """Cuts in one launch (narrow tiles) and in stripes (wide tiles)."""
    cuts = []
    for lanes, threads, unroll in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4)):
        if 32 <= -(-outputs // (lanes * 32)) <= 500 and not (threads == 1024 and unroll == 4):
            cuts.append(cut_of(lanes, threads, unroll, inputs, 1))
    for lanes, threads, unroll, groups in itertools.product((16, 32), (256, 512), (2, 4), (264, 528)):
        stripes = min(inputs // 64, max(1, round(groups / -(-outputs // (lanes * 32)))))
        if stripes > 1:
            cuts.append(cut_of(lanes, threads, unroll, inputs, stripes))
    return list(dict.fromkeys(cuts))


def overhead() -> list[dict]:
    """What a launch costs by itself: kernels that do nothing, with short and long texts."""
    rows = []
    make = mx.fast.metal_kernel if mx.metal.is_available() else mx.fast.cuda_kernel
    x = mx.zeros((64,))
    mx.eval(x)
    for padding in (0, 4000, 16000):
        text = "y[threadIdx.x] = x[threadIdx.x];" if not mx.metal.is_available() else "y[thread_position_in_grid.x] = 0;"
        kernel = make(
            name=f"nothing_{padding}", input_names=["x"], output_names=["y"], source="/*" + "." * padding + "*/" + text
        )
        call = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [(32,)], "output_dtypes": [mx.float32]}
        rows.append({"padding": padding, **timed(lambda i, k=kernel, c=call: k(inputs=[x], **c)[0])})
    for outputs, inputs in ((64, 128), (64, 4096)):
        layers = layers_of(outputs, inputs, 0.5)[:8]
        for stripes in (1, 2):
            use(cut_of(2, 256, 2, inputs, stripes))
            for one in layers:
                one.__dict__.pop("_gpu_plans", None)
            rows.append({"shape": [outputs, inputs], "stripes": stripes, **sparse(layers, inputs)})
        rows.append({"shape": [outputs, inputs], "stock": stock(outputs, inputs)})
    for row in rows:
        print(row)
    return rows


def about() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": str(mx.device_info().get("device_name", platform.machine())),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "calls": CALLS,
        "repeats": REPEATS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "sweep", "overhead", "profile"])
    parser.add_argument("shape", type=int, nargs="*")
    parser.add_argument("--cut", type=int, nargs=7, help="the fields of geometry.Geometry")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.random.seed(0)
    if args.what == "check":
        rows = check((2, 0, 1))
    elif args.what == "overhead":
        rows = overhead()
    elif args.what == "profile":
        use(geometry.Geometry(*args.cut))
        rows = [sparse(layers_of(*args.shape, 0.5), args.shape[1])]
        print(rows)
    else:
        rows = sweep(*args.shape, candidates(*args.shape), (0.5, 1.0, 0.0))
    document = {"about": about(), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1))
    print(json.dumps(document["about"]))


if __name__ == "__main__":
    main()
