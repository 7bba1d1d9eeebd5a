"""The CPU kernels against stock MLX and, given its sources, llama.cpp. The last line is one JSON document.

    python -m benchmarks.cpu speed [--llama-cpp SOURCES --gguf MODEL.gguf] [--only kernel,prefill,decode]
    python -m benchmarks.cpu ops [--threads 1]     # the operations other than the Zigzag product: a table
    python -m benchmarks.cpu rows                  # products of 1 to 32 rows
    python -m benchmarks.cpu experts               # decoding at a mixture's shape
    python -m benchmarks.cpu bands                 # CPU time by stored band, one thread
    python -m benchmarks.cpu table benchmarks/results/cpu.json    # the tables of docs/performance.md

Variants take turns in every repetition. Products of 192 MB of weights are evaluated as one graph, so that
none finds its weights in a cache. Every time of ours contains collecting the active channels and building
MLX's graph. `bands` reads the same random bytes as bands of different width and counts CPU time, not wall
time, because other work on the machine then counts only through the memory that it uses.
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


from benchmarks.machine import facts
from benchmarks.peer import Peer
from spqt_cli.backends import cpu, select
from spqt_cli.bench import models, shapes
from spqt_cli.decode import layers
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.decode.only_mlx import only_mlx
from spqt_cli.format import layout

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (11008, 4096), (576, 576), (1536, 576), (576, 1536))
SMOL_BLOCK = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
DENSITIES = (1.0, 0.5, 0.25)
BITS, GROUP_SIZE = 4, 64
ROTATED_BYTES = 192e6
PROMPT_TOKENS, PROMPT_BLOCKS, PROMPT_REPETITIONS = 512, 2, 3  # stock takes a second per block
BAND_SHAPES, PROMPT_ROWS, WAYS = ((28672, 8192), (11008, 4096)), 32, {"half": 0.5, "all": 1.0}


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
    codes, groups = layout.packed_shapes((outputs, inputs), BITS, GROUP_SIZE, band)
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
    fitted = models.fit_thresholds(zigzag, 0.5, text, fresh_cache(zigzag))
    rows = []
    for threads in counts:
        cpu.set_threads(threads)
        samples: dict[str, list[float]] = {}
        for _ in range(repetitions // 3 if small else repetitions // 2):
            for name, thresholds in (("dense", {}), ("half", fitted)):
                for path, layer in layers.zigzag_layers(zigzag).items():
                    layer.set_threshold(thresholds.get(path))
                samples.setdefault(name, []).append(
                    decode_rate(zigzag, fresh_cache(zigzag), 64 if small else 16)
                )
            if stock is not None:
                with only_mlx():
                    samples.setdefault("stock", []).append(decode_rate(stock, fresh_cache(stock), 12))
            if peer and small:
                samples.setdefault("llama.cpp", []).append(peer.ask(f"decode 64 1 {threads}"))
        row = {name: summary(values) for name, values in samples.items()}
        rates = ", ".join(f"{name} {value['median']}" for name, value in row.items())
        print(f"decode {shape} {threads}T tokens/s: {rates}", flush=True)
        rows.append({"shape": shape, "threads": threads, "tokens_per_s": row})
    return rows


def fresh_cache(model: Any) -> list[Any]:
    """A model's cache before any token."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


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
    weight, scales = layout.packed_shapes((outputs, inputs), BITS, GROUP_SIZE, band)
    copies = []
    for arrays in flat:
        layer = ZigzagLinear(outputs, BITS, GROUP_SIZE, band)
        layer.weight, layer.scales, layer.biases = (
            array.reshape(wanted) for array, wanted in zip(arrays, (weight, scales, scales), strict=True)
        )
        mx.eval(layer.parameters())
        copies.append(layer)
    return copies


def spent(work: Callable[[], Any]) -> float:
    """Milliseconds of CPU time."""
    start = time.process_time()
    mx.eval(work())
    return (time.process_time() - start) * 1e3


def band_rows(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of CPU time by band: a token at half and at all active, and PROMPT_ROWS rows."""
    outputs, inputs = shape
    flat = buffers(outputs, inputs)
    made = {band: layers_of(shape, band, flat) for band in bands(outputs)}
    x = mx.array(np.random.default_rng(3).normal(size=(1, 1, inputs)).astype(np.float32))
    prompt = mx.array(np.random.default_rng(4).normal(size=(1, PROMPT_ROWS, inputs)).astype(np.float32))
    times: dict[int, dict[str, list[float]]] = {band: {} for band in made}
    for repeat in range(repeats + 1):
        for band, copies in made.items():
            layer = copies[repeat % len(copies)]
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


def measure_bands(options: argparse.Namespace) -> None:
    """One thread: more would add up in the process's CPU time."""
    cpu.set_threads(1)
    rows = [row for shape in BAND_SHAPES for row in band_rows(shape, options.repetitions)]
    finish({"machine": facts(), "threads": cpu.threads(), "unit": "ms of CPU time", "rows": rows}, options)


def time_cell(us: dict[str, float] | None) -> str:
    """A median and its quartile distance; a dash where nothing was measured."""
    return f"{us['median']:.0f} ±{us['spread']:.0f}" if us else "-"


def kernel_table(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds of single products, by density for ours, and what they are of the others."""
    lines = [
        "| outputs x inputs | threads | stock MLX us | llama.cpp us | ours us at 1, 0.5, 0.25 | x stock "
        "| x llama.cpp | bytes, of reading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["threads"]):
        ours = [name for name in row["us"] if name.startswith("spqt")]
        cells = [
            row["shape"],
            row["threads"],
            *(time_cell(row["us"].get(name)) for name in ("stock", "llama.cpp")),
        ]
        cells.append(", ".join(time_cell(row["us"][name]) for name in ours))
        for other in ("stock", "llama.cpp"):
            cells.append(", ".join(f"{row['ratio'][name].get(other, '-')}" for name in ours))
        cells.append(", ".join(f"{share:.0%}" for share in row["share_of_reading"].values()))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def rate_table(rows: list[dict[str, Any]], what: str) -> list[str]:
    """Tokens per second, a line for each variant."""
    lines = [f"| {what} | threads | variant | tokens/s | spread |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["threads"]):
        for name, rate in row["tokens_per_s"].items():
            cells = [row.get("shape", "SmolLM2-135M"), row["threads"], name, rate["median"], rate["spread"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def print_tables(options: argparse.Namespace) -> None:
    if options.result is None:
        sys.exit("table needs the file that `speed --output` wrote")
    result = json.loads(options.result.read_text())
    load = f"{result['load_before'][0]:.1f} before, {result['load_after'][0]:.1f} after"
    print(f"{result['machine']}; {result['kernels']}; load {load}; reading {result['read_gb_per_s']} GB/s.")
    for lines in (
        kernel_table(result["kernel"]),
        rate_table(result["prefill"], "prompt of 512"),
        rate_table(result["decode"], "decode"),
    ):
        print("", *lines, sep="\n")


def measure_speed(options: argparse.Namespace) -> None:
    peer = Peer(options.llama_cpp) if options.llama_cpp else None
    if peer and options.gguf:
        peer.load(options.gguf)
    whole = peer if options.gguf else None
    result: dict[str, Any] = {"machine": facts(), "kernels": cpu.status()[1], "load_before": os.getloadavg()}
    counts = [int(count) for count in (options.threads or "1,2").split(",")]
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
            for shape in (options.shape or "smollm2-135m,llama-3.2-1b").split(",")
            for row in decode_rows(whole, shape, counts, options.repetitions)
        ]
    result["load_after"] = os.getloadavg()
    finish(result, options)


def measure_rows(options: argparse.Namespace) -> None:
    from benchmarks import cpu_rows

    result: dict[str, Any] = {"machine": facts(), "kernels": cpu.status()[1], "load_before": os.getloadavg()}
    print(result["machine"], result["kernels"], sep="\n", flush=True)
    finish(result | {"rows": cpu_rows.measure(options.repetitions)}, options)


def measure_ops(options: argparse.Namespace) -> None:
    from benchmarks import cpu_ops

    cpu_ops.table(int(options.threads or 1))


def measure_experts(options: argparse.Namespace) -> None:
    from benchmarks import cpu_experts

    options.shape = options.shape or "olmoe-1b-7b"
    result: dict[str, Any] = {"machine": facts(), "kernels": cpu.status()[1], "load_before": os.getloadavg()}
    print(result["machine"], result["kernels"], sep="\n", flush=True)
    result["decode"] = cpu_experts.measure(options)
    finish(result | {"load_after": os.getloadavg()}, options)


def finish(result: dict[str, Any], options: argparse.Namespace) -> None:
    document = json.dumps(result)
    if options.output:
        options.output.write_text(document + "\n")
    print(document)


COMMANDS = {
    "speed": measure_speed,
    "rows": measure_rows,
    "experts": measure_experts,
    "ops": measure_ops,
    "bands": measure_bands,
    "table": print_tables,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("result", type=Path, nargs="?", help="of `table`: the file to print")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp checkout, or llama-cpp-python's sources")
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct for llama.cpp's prompt and decode rows"
    )
    parser.add_argument("--only", default="kernel,prefill,decode", help="sections of `speed`")
    parser.add_argument("--threads", help="thread counts of `speed` (1,2), or of `ops` (1)")
    parser.add_argument("--repetitions", type=int, default=15, help="of kernels; at least 6")
    parser.add_argument("--shape", help="of the decode section (smollm2-135m,llama-3.2-1b) or of `experts`")
    parser.add_argument("--blocks", type=int, help="of `experts`: build only so many")
    parser.add_argument("--output", type=Path, help="file for the JSON document")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    usable, reason = cpu.status()
    if not usable and options.what != "table":
        sys.exit(f"the CPU kernels can't be measured: {reason}")
    COMMANDS[options.what](options)


if __name__ == "__main__":
    main()
