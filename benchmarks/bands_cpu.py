"""CPU time of the CPU kernels by stored band, one thread: a column of metal/README.md's table.

    SPQT_THREADS=1 python benchmarks/bands_cpu.py --output benchmarks/results/cpu-bands.json

The same random bytes are read as bands of different width, in turns. CPU time of the whole process, not the
clock: other work on the machine then counts only through the memory that it keeps busy. Weights rotate
through 192 MB or more. The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["SPQT_THREADS"] = "1"  # more would add up in the process's CPU time
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)

from machine import facts

from spqt_cli.backends import cpu
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout

SHAPES = ((28672, 8192), (11008, 4096))
BITS, GROUP_SIZE, ROTATED_BYTES, PROMPT_ROWS = 4, 64, 192e6, 32
WAYS = {"half": 0.5, "all": 1.0}


def bands(outputs: int) -> list[int]:
    """Powers of two, and the whole width cut into few bands."""
    widths = [band for band in (64, 128, 256, 512, 1024, 2048, 4096) if outputs % band == 0]
    widths += [outputs // n for n in range(1, 9) if outputs % (n * GROUP_SIZE) == 0]
    return sorted(set(widths))


def buffers(outputs: int, inputs: int) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Codes, scales and biases of several matrices as flat arrays; scales float16, as stored."""
    weights, groups = outputs * inputs, outputs * inputs // GROUP_SIZE
    random, made = np.random.default_rng(7), []
    for _ in range(max(1, round(ROTATED_BYTES / (weights * (BITS / 8 + 4 / GROUP_SIZE))))):
        codes = random.integers(0, 1 << 32, weights * BITS // 32, np.uint32)
        scales = random.uniform(0, 0.01, groups).astype(np.float16)
        made.append((mx.array(codes), mx.array(scales), mx.array(-8 * scales)))
    return made


def layers_of(shape: tuple[int, int], band: int, flat: list[tuple[mx.array, ...]]) -> list[ZigzagLinear]:
    """The same bytes as layers of this band."""
    outputs, inputs = shape
    weight, scales = layout.packed_shapes(outputs, inputs, BITS, GROUP_SIZE, band)
    layers = []
    for arrays in flat:
        layer = ZigzagLinear(outputs, BITS, GROUP_SIZE, band)
        layer.weight, layer.scales, layer.biases = (
            array.reshape(wanted) for array, wanted in zip(arrays, (weight, scales, scales), strict=True)
        )
        mx.eval(layer.parameters())
        layers.append(layer)
    return layers


def spent(work: Callable[[], Any]) -> float:
    """Milliseconds of CPU time."""
    start = time.process_time()
    mx.eval(work())
    return (time.process_time() - start) * 1e3


def measure(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of CPU time by band: a token at half and at all active, and PROMPT_ROWS rows."""
    outputs, inputs = shape
    flat = buffers(outputs, inputs)
    made = {band: layers_of(shape, band, flat) for band in bands(outputs)}
    x = mx.array(np.random.default_rng(3).normal(size=(1, 1, inputs)).astype(np.float32))
    prompt = mx.array(np.random.default_rng(4).normal(size=(1, PROMPT_ROWS, inputs)).astype(np.float32))
    times: dict[int, dict[str, list[float]]] = {band: {} for band in made}
    for repeat in range(repeats + 1):
        for band, layers in made.items():
            layer = layers[repeat % len(layers)]
            for way, density in WAYS.items():
                layer.set_threshold(statistics.NormalDist().inv_cdf(1 - density / 2))
                took = spent(lambda layer=layer: cpu.sparse_gemv(x, [layer])[0])
                times[band].setdefault(way, []).append(took)
            if repeat <= 3:
                took = spent(lambda layer=layer: cpu.matmul(prompt, layer))
                times[band].setdefault("prompt", []).append(took)
    rows = []
    for band, found in times.items():
        medians = {way: round(statistics.median(samples[1:]), 2) for way, samples in found.items()}
        rows.append({"shape": list(shape), "band": band, **medians})
        print(f"{outputs}x{inputs} band {band:5}: " + " ".join(f"{k} {v} ms" for k, v in medians.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    usable, reason = cpu.status()
    if not usable:
        raise SystemExit(f"the CPU kernels don't run here: {reason}")
    rows = [row for shape in SHAPES for row in measure(shape, arguments.repeats)]
    document = {"machine": facts(), "threads": cpu.threads(), "unit": "ms of CPU time", "rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
