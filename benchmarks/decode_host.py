"""Where the host's time goes in a decode step: building the graph, encoding it, and the whole step.

    python benchmarks/decode_host.py --shape llama-3-8b --blocks 8 --depth 0,8192 --output host.json

Random weights; stock, Zigzag dense and sparse, the latter two with blocks as two calls around attention
and with their layers one by one. Microseconds per block, medians over the steps of all rounds; `build` is
Python up to the lazy result, `encode` is mx.async_eval, which also waits when the device is far behind.
Where torch can profile the device, its kernel time stands beside. Works from a bare checkout.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_decode_gpu import from_bare_tree
from machine import facts

from_bare_tree()
import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from spqt_cli.backends import select
from spqt_cli.bench import bench, models
from spqt_cli.decode import active_counts, phase
from spqt_cli.decode.layers import zigzag_layers

WARM_STEPS, STEPS, ROUNDS = 4, 60, 4
LARGEST = 12  # kernels that are told apart
VARIANTS = [("stock", False), ("dense", False), ("dense", True), ("sparse", False), ("sparse", True)]


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
        self.blocks = [(one, one.__dict__["_block"]) for one in modules if "_block" in one.__dict__]

    def variant(self, kind: str, whole: bool) -> Any:
        """The model of a variant, in its state."""
        for module, block in self.blocks:
            object.__setattr__(module, "_block", block if whole else None)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--depth", default="0")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    depths = [int(part) for part in arguments.depth.split(",")]
    prepared = Prepared(arguments.shape, arguments.blocks, depths, arguments.sparsity)
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


if __name__ == "__main__":
    main()
