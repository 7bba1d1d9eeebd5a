"""Decode speed at the shapes of large models with random weights, stock mlx-lm in the same run.

    python -m benchmarks.decode models --output decode.json
    python -m benchmarks.decode models --output prompts.json --shapes llama-3-8b --depth 0 \\
        --prompt-tokens 512,2048,8192
    python -m benchmarks.decode models --output peers.json --shapes llama-3-8b --llama-cpp CHECKOUT
    python -m benchmarks.decode host --shapes llama-3-8b --blocks 8 --depth 0,8192 --output host.json

`models` measures each shape: with --profile first the kernels, whose crossovers become this device's profile;
then 0 % and --sparsity at every depth. With --llama-cpp its llama-bench is built for this machine and takes
turns with stock and ours on random Q4_0 weights of the same shape; a second table holds ours against the
better of the two. Tables go to stdout. The JSON file holds every sample and is rewritten after each shape. A
shape that fails is reported and the others still run; the exit code is then 1.

`host` shows the host's part of a decode step, in microseconds per block: `build` is Python up to the lazy
result, `encode` is mx.async_eval, which also waits when the device is far behind, `step` is the whole step.
Variants are stock, Zigzag dense and sparse, the latter two with fused blocks and layer by layer. Where torch
can profile the device, `device` is its kernel time. Both run from a checkout without an installed spqt.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import facts, from_bare_tree

from_bare_tree()
import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from benchmarks.peer import BUILD, llama_bench
from spqt_cli.backends import select
from spqt_cli.bench import bench, model_timing, models, results, shapes
from spqt_cli.decode import active_counts, fused, phase
from spqt_cli.decode.layers import zigzag_layers

WARM_STEPS, STEPS, ROUNDS = 4, 60, 4
LARGEST = 12  # kernels that are told apart
VARIANTS = [("stock", False), ("dense", False), ("dense", True), ("sparse", False), ("sparse", True)]
HOST_BLOCKS = 8


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers; empty for an empty text."""
    return [int(part) for part in text.split(",") if part]


def options_of(
    shape: str, arguments: argparse.Namespace, depths: list[int], prompts: list[int]
) -> bench.Options:
    """What to measure for one shape."""
    return bench.Options(
        shape=shape,
        sparsities=[float(part) for part in arguments.sparsity.split(",")],
        depths=depths,
        prompt_tokens=prompts,
        generation_tokens=arguments.generation_tokens,
        repetitions=arguments.repetitions,
        blocks=arguments.blocks,
        dtype=arguments.dtype,
        commit=arguments.commit,
    )


def measure(shape: str, arguments: argparse.Namespace) -> list[results.Report]:
    """The kernel report, where a profile was asked for, and the model report of one shape."""
    reports = []
    began = time.monotonic()

    def show(done: float, total: float, what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {shape}  {what}", file=sys.stderr)

    options = options_of(shape, arguments, arguments.depth or [0, 8192], arguments.prompt_tokens)
    if arguments.profile:
        reports.append(bench.run_kernels(options, show))
        bench.write_profile(reports[-1])
    peers: list[model_timing.Peer] = []
    if arguments.llama_cpp:
        config = shapes.config(shape, arguments.blocks)
        peers.append(llama_bench.LlamaBench(arguments.llama_cpp, config, arguments.gguf_folder))
    reports.append(bench.run(options, show, peers))
    return reports


def against_better_peer(report: results.Report) -> str:
    """Each of our variants against the faster of stock and the other programs, repetition by repetition.

    Faster by the median in that test. Empty where stock alone was there.
    """
    lines = []
    rows = [row for row in report.rows if isinstance(row, results.ModelRow)]
    for key in dict.fromkeys((row.test, row.depth) for row in rows):
        of_test = [row for row in rows if (row.test, row.depth) == key]
        others = [row for row in of_test if row.sparsity is None]
        best = max(others, key=lambda row: row.rate.median)
        for row in of_test:
            if row.sparsity is not None and len(others) > 1:
                found = results.ratio(row.rate, best.rate, of_times=False)
                ranged = f"{found.median:.2f} ({min(found.samples):.2f}-{max(found.samples):.2f})"
                lines.append(f"| {key[0]} @ d{key[1]} | {row.variant} | {best.variant} | {ranged} |")
    head = "| test | variant | better peer | x better peer (median, range) |\n|---|---|---|---|\n"
    return head + "\n".join(lines) if lines else ""


def measure_models(arguments: argparse.Namespace) -> int:
    """Every shape; 1 if one of them failed."""
    documents, failed = [], 0
    for shape in arguments.shapes.split(","):
        try:
            reports = measure(shape, arguments)
        except Exception:  # one shape must not cost the others
            traceback.print_exc()
            failed = 1
            continue
        for report in reports:
            print(results.render(report, "md") + "\n", flush=True)
            if headline := against_better_peer(report):
                print(headline + "\n", flush=True)
            documents.append(results.plain(report))
        arguments.output.write_text(json.dumps(documents) + "\n")
    return failed


class Prepared:
    """One subject, and the switch between its variants."""

    def __init__(self, shape: str, block_count: int, depths: list[int], sparsity: float) -> None:
        options = bench.Options(
            shape=shape, blocks=block_count, sparsities=[sparsity], depths=depths, prompt_tokens=[]
        )
        self.subject, self.count = bench.make_subject(options), block_count
        self.caches = {depth: models.caches(self.subject, depth) for depth in depths}
        first = self.caches[depths[0]]["zigzag"]
        self.thresholds = self.subject.thresholds(sparsity, first, WARM_STEPS + STEPS)
        modules = self.subject.zigzag.modules()
        self.blocks = [(one, one.__dict__[fused.BLOCK]) for one in modules if fused.BLOCK in one.__dict__]

    def variant(self, kind: str, whole: bool) -> Any:
        """The model of a variant, in its state."""
        for module, block in self.blocks:
            object.__setattr__(module, fused.BLOCK, block if whole else None)
        for path, layer in zigzag_layers(self.subject.zigzag).items():
            layer.set_threshold(self.thresholds[path] if kind == "sparse" else None)
        return self.subject.stock if kind == "stock" else self.subject.zigzag

    def steps(
        self, kind: str, whole: bool, depth: int, watch: Any = None
    ) -> list[tuple[float, float, float]]:
        """(build, encode, whole step) of each step, in microseconds per block; `watch` sees these alone."""
        model = self.variant(kind, whole)
        cache = self.caches[depth]["stock" if kind == "stock" else "zigzag"]
        token, found = self.subject.prompt(depth, 1), []
        with active_counts.counting(select.backend().count_every), contextlib.ExitStack() as watching:
            for step in range(WARM_STEPS + STEPS):
                if watch is not None and step == WARM_STEPS:  # steps are prepared by now
                    watching.enter_context(watch)
                began = time.perf_counter()
                with phase.decoding():
                    token = model(token[None], cache=cache)[:, -1, :].argmax(-1)
                built = time.perf_counter()
                mx.async_eval(token)
                encoded = time.perf_counter()
                if step < WARM_STEPS:
                    mx.eval(token)
                found.append((began, built, encoded))
            mx.eval(token)
        end = time.perf_counter()
        trim_prompt_cache(cache, WARM_STEPS + STEPS)
        timed = found[WARM_STEPS:]
        whole_step = (end - timed[0][0]) / len(timed)
        scale = 1e6 / self.count
        return [((b - a) * scale, (c - b) * scale, whole_step * scale) for a, b, c in timed]


def device_times(run: Callable[[Any], Any], count: int) -> dict[str, float]:
    """Microseconds per block and step by kernel, and in `all`, by CUDA's own counters; {} without torch."""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return {}
    if not mx.cuda.is_available():
        return {}
    found = profile(activities=[ProfilerActivity.CUDA])
    run(found)
    times = {row.key: row.self_device_time_total / count / STEPS for row in found.key_averages()}
    largest = sorted(times, key=lambda key: -times[key])[:LARGEST]
    return {"all": round(sum(times.values()), 1), **{key: round(times[key], 1) for key in largest}}


def measure_host(arguments: argparse.Namespace) -> int:
    """The host's time in a decode step of the first shape."""
    shape, sparsity = arguments.shapes.split(",")[0], float(arguments.sparsity.split(",")[-1])
    depths = arguments.depth or [0]
    prepared = Prepared(shape, arguments.blocks or HOST_BLOCKS, depths, sparsity)
    rows = []
    print("| depth | variant | blocks | build | encode | step | device |\n|---|---|---|---|---|---|---|")
    for depth in depths:
        samples: dict[Any, list] = {variant: [] for variant in VARIANTS}
        for turn in range(ROUNDS + 1):
            for variant in VARIANTS:  # in turns, so that a busy moment hits all
                found = prepared.steps(*variant, depth)
                samples[variant] += found if turn else []
        for (kind, whole), found in samples.items():
            build, encode, step = (round(statistics.median(column), 1) for column in zip(*found, strict=True))
            device = device_times(
                lambda watch, k=kind, w=whole, d=depth: prepared.steps(k, w, d, watch), prepared.count
            )
            row = {"depth": depth, "variant": kind, "blocks": whole, "build": build, "encode": encode}
            rows.append(row | {"step": step, "device": device})
            form = "-" if kind == "stock" else "whole" if whole else "by layer"
            print(
                f"| {depth} | {kind} | {form} | {build} | {encode} | {step} | {device.get('all', '')} |",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": facts(), "rows": rows}, indent=1) + "\n")
    return 0


COMMANDS = {"models": measure_models, "host": measure_host}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--output", type=Path, help="JSON file to write; `models` needs one")
    parser.add_argument("--shapes", default="llama-3-8b,llama-3-70b", help="`host` takes the first")
    parser.add_argument("--sparsity", default="0.25,0.5", help="0 is always measured; `host` takes the last")
    parser.add_argument("--depth", type=numbers, help="tokens of context; default 0,8192, of `host` 0")
    parser.add_argument("--prompt-tokens", type=numbers, default=[512], help="'' for none")
    parser.add_argument("--generation-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--blocks", type=int, help=f"transformer blocks: all; `host` {HOST_BLOCKS}")
    parser.add_argument("--dtype", help="default: the model's own")
    parser.add_argument("--profile", action="store_true", help="measure kernels first and follow them")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp checkout, or llama-cpp-python's sources")
    parser.add_argument(
        "--gguf-folder", type=Path, default=BUILD.parent, help="where models for llama.cpp are written"
    )
    parser.add_argument("--commit", help="where git is not there to name it")
    arguments = parser.parse_args()
    if arguments.what == "models" and arguments.output is None:
        parser.error("models needs --output")
    return COMMANDS[arguments.what](arguments)


if __name__ == "__main__":
    sys.exit(main())
