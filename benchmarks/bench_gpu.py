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
GROUPS = [("q/k/v", (4096, 1024, 1024), 4096), ("gate/up", (14336, 14336), 4096), ("gate/up", (28672, 28672), 8192)]
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
from spqt_cli import geometry, gpu, layout, trust  # noqa: E402


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
    trust.verdict = lambda *_, **__: ""  # a sweep meets many variants; `check` covers what is shipped


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
        if (group != 64 or dtype != mx.float16) and (bits != 4 or decode != decodes[0]):
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
    for row in sorted(done, key=lambda r: r[str(density[0])])[:14]:
        cut = geometry.Geometry(**row["cut"])
        times = "  ".join(f"{d}: {row[str(d)]:7.2f} ({base['us'] / row[str(d)]:.2f}x)" for d in density)
        print(
            f"  {cut.outputs} x {cut.lanes:2} x {cut.rows:3} unroll {cut.unroll} decode {cut.decode} list {cut.list:4}"
            f" stripe {cut.stripe:5}  {times}"
        )
    return rows


def candidates(outputs: int, inputs: int) -> list[geometry.Geometry]:
    """Cuts around the rule's: rows, channels in flight, threadgroups, wider lanes, decoders."""
    units = -(-layout.band_of(outputs, 64) // 32)
    lanes = -(-units // -(-units // 32))
    cuts = []
    for rows, unroll, groups in itertools.product((8, 16), (2, 4, 6), (128, 264)):
        if rows * unroll <= 64:
            cuts.append(cut_of(lanes, rows, unroll, (outputs, inputs), groups))
    cuts += [cut_of(lanes, 8, 4, (outputs, inputs), 128, decode=decode) for decode in (0, 1)]
    cuts += [cut_of(-(-lanes // 2), 16, unroll, (outputs, inputs), 128, outputs=64) for unroll in (1, 2)]
    return list(dict.fromkeys(cuts))


def cut_of(lanes: int, rows: int, unroll: int, shape: tuple[int, int], groups: int, **more: int) -> geometry.Geometry:
    outputs, inputs = shape
    settings = {"outputs": 32, "slice": 8, "decode": 2, **more}
    band = layout.band_of(outputs, 64)
    tiles = -(-band // (lanes * settings["outputs"])) * -(-outputs // band)
    stripe = -(-inputs // max(1, groups // tiles))
    threads = -(-lanes * rows // 32) * 32
    collected = threads * max(1, min(8192 // threads, 32, -(-stripe // threads)))
    return geometry.Geometry(lanes=lanes, rows=rows, unroll=unroll, list=collected, stripe=stripe, **settings)


def overhead() -> list[dict]:
    """What a launch costs by itself: kernels that do nothing, with short and long texts."""
    rows = []
    make = mx.fast.metal_kernel if mx.metal.is_available() else mx.fast.cuda_kernel
    x = mx.zeros((64,))
    mx.eval(x)
    index = "thread_position_in_grid.x" if mx.metal.is_available() else "threadIdx.x"
    for inputs, outputs, padding in ((1, 1, 0), (5, 1, 0), (1, 2, 0), (5, 2, 0), (5, 2, 8000)):
        kernel = make(
            name=f"nothing_{inputs}_{outputs}_{padding}",
            input_names=[f"x{i}" for i in range(inputs)],
            output_names=[f"y{i}" for i in range(outputs)],
            source="/*" + "." * padding + "*/" + "".join(f"y{i}[{index}] = 0;" for i in range(outputs)),
        )
        call = {
            "inputs": [x] * inputs, "grid": (32, 1, 1), "threadgroup": (32, 1, 1),
            "output_shapes": [(32,)] * outputs, "output_dtypes": [mx.float32] * outputs,
        }  # fmt: skip
        costs = timed(lambda i, k=kernel, c=call: k(**c)[0])
        rows.append({"inputs": inputs, "outputs": outputs, "padding": padding, **costs})
    for outputs, inputs in ((64, 128), (64, 4096)):
        layers = layers_of(outputs, inputs, 0.5)[:8]
        for stripes in (1, 2):
            use(cut_of(2, 128, 2, (outputs, inputs), stripes))
            for one in layers:
                one.__dict__.pop("_gpu_plans", None)
            rows.append({"shape": [outputs, inputs], "stripes": stripes, **sparse(layers, inputs)})
        rows.append({"shape": [outputs, inputs], "stock": stock(outputs, inputs)})
    for row in rows:
        print(row)
    return rows


def shapes() -> list[dict]:
    """The rule's own geometry at several densities, beside stock in the same run; then shared inputs."""
    rows = []
    for outputs, inputs in SHAPES:
        row = {"shape": [outputs, inputs], "band": layout.band_of(outputs, 64), "stock": stock(outputs, inputs)}
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
                lambda i, s=stacks, n=copies, x=xs: gpu.sparse_gemv(x[i % 8], [stack[i % n] for stack in s])[0]
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
        print(f"{outputs}x{inputs} band {band:5}: half {row['half']['us']} all {row['all']['us']} prefill {row['prefill']}")
    return rows


def once(call: Callable[[], mx.array]) -> float:
    """Microseconds of a call: the median of a few evaluations of eight."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        mx.eval([call() for _ in range(8)])
        times.append((time.perf_counter() - start) / 8 * 1e6)
    return round(statistics.median(times[1:]), 1)


def dequantized(x: mx.array, layer: Packed) -> mx.array:
    gpu.DEQUANTIZE_ROWS = 2
    return gpu.matmul(x, layer)


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
            "gemvs": once(lambda o=ones: mx.concatenate([gpu.sparse_gemv(i, [layer])[0][0] for i in o], 1)) if ones else None,
        }
        rows.append(row)
        print(row)
    return rows


def about() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "shapes", "sweep", "bands", "prefill", "overhead", "profile"])
    parser.add_argument("shape", type=int, nargs="*")
    parser.add_argument("--cut", type=int, nargs=8, help="the fields of geometry.Geometry")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.random.seed(0)
    if args.what == "check":
        rows = check((2, 0))
    elif args.what == "overhead":
        rows = overhead()
    elif args.what == "shapes":
        rows = shapes()
    elif args.what in ("bands", "prefill"):
        rows = {"bands": bands, "prefill": prefill}[args.what](*args.shape)
    elif args.what == "profile":
        use(geometry.Geometry(*args.cut))
        rows = [sparse(layers_of(*args.shape, 0.5), args.shape[1])]
        print(rows)
    else:
        rows = sweep(*args.shape, candidates(*args.shape), (0.5, 1.0))
    document = {"about": about(), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1))
    print(json.dumps(document["about"]))


if __name__ == "__main__":
    main()
