"""The CPU kernels against stock MLX and, given its sources, llama.cpp. The last line is one JSON document.

    python benchmarks/bench_cpu.py [--llama-cpp SOURCES --gguf MODEL.gguf] [--only kernel,prefill,decode]

Variants take turns in every repetition. Products of 192 MB of weights are evaluated as one graph, ours and
llama.cpp's, so that none finds its own in a cache; index collection and building MLX's graph are inside every
time of ours. Loss or gain, all is printed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)

from machine import facts
from peer import Peer

from spqt_cli.backends import cpu, select
from spqt_cli.bench import models, shapes
from spqt_cli.decode import layers
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (11008, 4096), (576, 576), (1536, 576), (576, 1536))
SMOL_BLOCK = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
DENSITIES = (1.0, 0.5, 0.25)
BITS, GROUP_SIZE = 4, 64
ROTATED_BYTES = 192e6
PROMPT_TOKENS, PROMPT_BLOCKS, PROMPT_REPETITIONS = 512, 2, 3  # stock takes a second per block


def clock(work: Callable[[], Any]) -> float:
    """Seconds that `work` and the evaluation of what it returns take."""
    start = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - start


def summary(samples: list[float]) -> dict[str, float]:
    """Median, quartile distance and best of samples."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": round(middle, 2), "spread": round(high - low, 2), "min": round(min(samples), 2)}


def read_bandwidth(threads: int) -> float:
    """GB/s that so many threads read of memory far larger than the caches: the best of several."""
    words = np.ones(1 << 26, np.int64)
    parts = np.array_split(words, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(9):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, words.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def random_layer(outputs: int, inputs: int) -> ZigzagLinear:
    """A Zigzag layer of random codes, scales in float16 as a converted folder stores them."""
    band = layout.band_of(outputs, GROUP_SIZE)
    layer = ZigzagLinear(outputs, BITS, GROUP_SIZE, band)
    codes, groups = layout.packed_shapes(outputs, inputs, BITS, GROUP_SIZE, band)
    layer.weight = mx.random.randint(0, 2**31 - 1, codes).astype(mx.uint32)
    layer.scales = (mx.random.uniform(shape=groups) * 0.01).astype(mx.float16)
    layer.biases = (-8 * layer.scales).astype(mx.float16)
    mx.eval(layer.parameters())
    return layer


def stock_matrix(outputs: int, inputs: int) -> tuple[mx.array, mx.array, mx.array]:
    """The same in MLX's own layout with float32 scales, which is what its CPU build is fastest with."""
    packed = mx.quantize(mx.random.normal((outputs, inputs)), group_size=GROUP_SIZE, bits=BITS)
    mx.eval(packed)
    return packed


def stock_product(x: mx.array, packed: tuple[mx.array, mx.array, mx.array]) -> mx.array:
    return mx.quantized_matmul(x, *packed, group_size=GROUP_SIZE, bits=BITS)


class Case:
    """One shape: enough layers of ours, one stock matrix, an input and a threshold for every density."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.outputs, self.inputs = outputs, inputs
        self.bytes = outputs * inputs * (BITS / 8 + 4 / GROUP_SIZE)  # codes, scales and biases
        count = max(4, int(ROTATED_BYTES / self.bytes))
        self.layers = [random_layer(outputs, inputs) for _ in range(count)]
        self.stock = stock_matrix(outputs, inputs)
        self.x = mx.random.normal((1, inputs))
        magnitudes = np.sort(np.abs(np.array(self.x)).ravel())
        self.thresholds = {d: mx.array([float(magnitudes[round((1 - d) * inputs)])]) for d in DENSITIES}
        mx.eval(self.x, self.thresholds)

    def ours(self, density: float) -> float:
        """Microseconds of one product of ours, prepared as decoding prepares it."""
        for layer in self.layers:
            layer.set_threshold(self.thresholds[density])
        steps = [select.prepare([layer]) for layer in self.layers]
        products = clock(lambda: [step(self.x, None)[0][0] for step in steps])
        return products / len(self.layers) * 1e6

    def samples(self, peer: Peer | None, threads: int) -> dict[str, float]:
        """One sample of every variant, one after another; microseconds."""
        taken = {"stock": clock(lambda: stock_product(self.x, self.stock)) * 1e6}
        if peer:
            taken["llama.cpp"] = peer.ask(f"mul {self.outputs} {self.inputs} {threads}")
        return taken | {f"spqt {d}": self.ours(d) for d in DENSITIES}


def kernel_rows(peer: Peer | None, read: dict[int, float], repetitions: int) -> list[dict[str, Any]]:
    """Microseconds of one product by shape, density and variant. read: GB/s by thread counts to measure."""
    rows = []
    for outputs, inputs in SHAPES:
        case = Case(outputs, inputs)
        for threads, bandwidth in read.items():
            cpu.set_threads(threads)
            rounds = [case.samples(peer, threads) for _ in range(repetitions + 1)][1:]  # the first warms up
            us = {name: summary([one[name] for one in rounds]) for name in rounds[0]}
            row: dict[str, Any] = {"shape": f"{outputs}x{inputs}", "threads": threads, "us": us}
            row["share_of_reading"] = {
                density: round(case.bytes * density / us[f"spqt {density}"]["median"] / 1e3 / bandwidth, 3)
                for density in DENSITIES
            }
            row["ratio"] = print_kernel(row)
            rows.append(row)
    return rows


def print_kernel(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row; returns how many times faster each variant of ours is than stock and the peer."""
    us = {name: value["median"] for name, value in row["us"].items()}
    others = [name for name in ("stock", "llama.cpp") if name in us]
    print(f"{row['shape']:>11} {row['threads']}T", *(f"{name} {us[name]:.1f} us" for name in others))
    ratios = {}
    for density, share in row["share_of_reading"].items():
        name = f"spqt {density}"
        ratios[name] = {other: round(us[other] / us[name], 2) for other in others}
        spread = row["us"][name]["spread"] / us[name]
        against = "  ".join(f"{value:6.2f}x {other}" for other, value in ratios[name].items())
        print(
            f"  {name:>9} {us[name]:8.1f} us +-{spread:4.0%}  {against}  {share:.0%} of reading", flush=True
        )
    return ratios


def prefill_rows(peer: Peer | None, counts: list[int]) -> list[dict[str, Any]]:
    """Prompt tokens/s through the block projections of SmolLM2-135M; llama.cpp's is the whole model's."""
    blocks = [[random_layer(*shape) for shape in SMOL_BLOCK] for _ in range(PROMPT_BLOCKS)]
    stocks = [stock_matrix(*shape) for _ in range(PROMPT_BLOCKS) for shape in SMOL_BLOCK]
    xs = {k: mx.random.normal((1, PROMPT_TOKENS, k)) for k in (576, 1536)}
    mx.eval(xs)
    scale = PROMPT_TOKENS * PROMPT_BLOCKS / shapes.config("smollm2-135m")["num_hidden_layers"]
    inputs = [xs[k] for _, k in SMOL_BLOCK * PROMPT_BLOCKS]
    rows = []
    for threads in counts:
        cpu.set_threads(threads)
        samples: dict[str, list[float]] = {"spqt": [], "stock": [], "llama.cpp": []}
        for _ in range(PROMPT_REPETITIONS):
            ours = clock(lambda: [cpu.matmul(xs[one.inputs], one) for block in blocks for one in block])
            samples["spqt"].append(scale / ours)
            stock = clock(
                lambda: [stock_product(x, packed) for x, packed in zip(inputs, stocks, strict=True)]
            )
            samples["stock"].append(scale / stock)
            if peer:
                samples["llama.cpp"].append(peer.ask(f"prompt {PROMPT_TOKENS} {threads}"))
        row = {name: summary(values) for name, values in samples.items() if values}
        ratio = row["spqt"]["median"] / row["stock"]["median"]
        print(
            f"prefill {threads}T tokens/s: " + ", ".join(f"{n} {v['median']}" for n, v in row.items()), end=""
        )
        print(f": {ratio:.1f}x stock", flush=True)
        rows.append({"threads": threads, "tokens_per_s": row})
    return rows


def decode_rate(model: Any, cache: list[Any], tokens: int) -> float:
    """Tokens per second of mlx-lm's own greedy loop, from the second token on."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array([100]), model, max_tokens=tokens, prompt_cache=cache)
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return count / (time.perf_counter() - start)


def decode_rows(peer: Peer | None, shape: str, counts: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Tokens/s of a whole model of that shape, random weights; stock only where it is not hopeless."""
    config = shapes.config(shape)
    zigzag = models.random_model(config, BITS, GROUP_SIZE, mx.float16)
    models.evaluate(zigzag)
    small = config["hidden_size"] < 1024
    stock = models.stock_twin(zigzag, config) if small else None
    text = mx.random.randint(0, config["vocab_size"], (64,))
    fitted = models.fit_thresholds(zigzag, 0.5, text, _cache(zigzag))
    rows = []
    for threads in counts:
        cpu.set_threads(threads)
        samples: dict[str, list[float]] = {}
        for _ in range(repetitions // 3 if small else repetitions // 2):
            for name, thresholds in (("dense", {}), ("half", fitted)):
                for path, layer in layers.zigzag_layers(zigzag).items():
                    layer.set_threshold(thresholds.get(path))
                samples.setdefault(name, []).append(decode_rate(zigzag, _cache(zigzag), 64 if small else 16))
            if stock is not None:
                with models.only_mlx():
                    samples.setdefault("stock", []).append(decode_rate(stock, _cache(stock), 12))
            if peer and small:
                samples.setdefault("llama.cpp", []).append(peer.ask(f"decode 64 1 {threads}"))
        row = {name: summary(values) for name, values in samples.items()}
        rates = ", ".join(f"{name} {value['median']}" for name, value in row.items())
        print(f"decode {shape} {threads}T tokens/s: {rates}", flush=True)
        rows.append({"shape": shape, "threads": threads, "tokens_per_s": row})
    return rows


def _cache(model: Any) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp checkout, or llama-cpp-python's sources")
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct for llama.cpp's prompt and decode rows"
    )
    parser.add_argument("--only", default="kernel,prefill,decode", help="sections to run")
    parser.add_argument("--threads", default="1,2", help="thread counts")
    parser.add_argument("--repetitions", type=int, default=15, help="of kernels; at least 6")
    parser.add_argument("--shape", default="smollm2-135m,llama-3.2-1b", help="of the decode section")
    parser.add_argument("--output", type=Path, help="file for the JSON document")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    usable, reason = cpu.status()
    if not usable:
        sys.exit(f"the CPU kernels can't be measured: {reason}")
    peer = Peer(options.llama_cpp) if options.llama_cpp else None
    if peer and options.gguf:
        peer.load(options.gguf)
    whole = peer if options.gguf else None
    result: dict[str, Any] = {"machine": facts(), "kernels": reason, "load_before": os.getloadavg()}
    counts = [int(count) for count in options.threads.split(",")]
    read = {n: round(read_bandwidth(n), 1) for n in counts}
    result["read_gb_per_s"] = read
    print(result["machine"], result["kernels"], f"read {read} GB/s", sep="\n", flush=True)
    if "kernel" in options.only:
        result["kernel"] = kernel_rows(peer, read, options.repetitions)
    if "prefill" in options.only:
        result["prefill"] = prefill_rows(whole, counts)
    if "decode" in options.only:
        result["decode"] = [
            row
            for shape in options.shape.split(",")
            for row in decode_rows(whole, shape, counts, options.repetitions)
        ]
    result["load_after"] = os.getloadavg()
    document = json.dumps(result)
    if options.output:
        options.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
