"""What the GPU benchmarks share: weights on the device, timing, and the row-grouped baseline."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
CALLS = 64  # in one evaluation
REPEATS = 11
ROTATED_BYTES = 400e6  # of weights: several times an H200's 60 MB of L2


def from_bare_tree() -> None:
    """Makes an uninstalled checkout importable: the kernel bodies lie beside the package there."""
    sys.path.insert(0, str(ROOT))
    link = ROOT / "spqt_cli" / "metal"
    try:
        import spqt_cli.metal  # noqa: F401
    except ModuleNotFoundError:
        link.symlink_to(Path("..") / "metal")


from_bare_tree()
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.bench import quiet_host
from spqt_cli.format import layout

HOST = quiet_host.Watch()


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


def timed(build: Callable[[int], list[mx.array]]) -> dict[str, float | None]:
    """Microseconds per call: evaluation (dispatch included) and building the graph in Python.

    us_quiet: the median of the repeats whose host was quiet (spqt_cli/bench/quiet_host.py), where two or more were.
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
