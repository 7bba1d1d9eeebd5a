"""Decoding of a mixture's shape on the CPU: `python -m benchmarks.cpu experts --shape olmoe-1b-7b`.

Random weights, mlx-lm's own loop; nothing skipped, half skipped and, given its sources, llama.cpp (Q4_0, the
head Q6_K, random weights of the same sizes, written to build/) in turns. CPU time is counted as well: on a
busy machine it is steadier than tokens per second. Stock MLX is left to `spqt bench`.
"""

import argparse
import json
import time
from typing import Any

import mlx.core as mx

from benchmarks import cpu
from benchmarks.machine import ROOT
from benchmarks.peer import Peer, random_gguf
from spqt_cli.backends import cpu as backend
from spqt_cli.bench import models, shapes
from spqt_cli.decode import layers, session

TOKENS, DEPTH = 24, 1
HALF = 0.5


def peer_of(config: dict[str, Any], options: argparse.Namespace) -> Peer | None:
    """llama.cpp with a model of that config loaded."""
    if options.llama_cpp is None:
        return None
    if config["model_type"] != "olmoe":
        raise SystemExit("a random .gguf file is written for the architecture olmoe alone")
    path = ROOT / "build" / f"{options.shape}.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        random_gguf.write(config, path)
    peer = Peer(options.llama_cpp)
    peer.load(path)
    return peer


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of threads: tokens per second, and half skipped against the others."""
    config = shapes.config(options.shape, options.blocks)
    model = models.random_model(config, cpu.BITS, cpu.GROUP_SIZE, mx.float16)
    models.evaluate(model)
    text = mx.random.randint(0, config["vocab_size"], (64,))
    fitted = models.fit_thresholds(model, HALF, text, cpu.fresh_cache(model))
    other, zigzag = session.weight_bytes(model, config)
    sizes = {"dense": other + sum(zigzag.values()), "half": other + (1 - HALF) * sum(zigzag.values())}
    peer = peer_of(config, options)
    rows = []
    for threads in map(int, (options.threads or "2").split(",")):
        backend.set_threads(threads)
        rounds = [taken(model, fitted, peer, threads) for _ in range(options.repetitions + 1)][1:]
        samples = {name: [one[name][0] for one in rounds] for name in rounds[0]}
        spent = {name: [one[name][1] for one in rounds] for name in ("dense", "half")}
        ratios = {
            f"half / {name}": [one["half"][0] / one[name][0] for one in rounds]
            for name in samples
            if name != "half"
        }
        ratios["half / dense, by CPU time"] = [one["dense"][1] / one["half"][1] for one in rounds]
        rows.append(
            {
                "shape": options.shape,
                "blocks": config["num_hidden_layers"],
                "threads": threads,
                "mb_per_token": {name: round(size / 1e6, 1) for name, size in sizes.items()},
                "tokens_per_s": {name: cpu.summary(values) for name, values in samples.items()},
                "cpu_ms_per_token": {name: cpu.summary(values) for name, values in spent.items()},
                "ratios": {name: cpu.summary(values) for name, values in ratios.items()},
            }
        )
        print_row(rows[-1])
    return rows


def taken(
    model: Any, fitted: dict[str, Any], peer: Peer | None, threads: int
) -> dict[str, tuple[float, float]]:
    """Tokens per second of every variant, one after another, and milliseconds of CPU time a token."""
    found = {}
    for name, thresholds in (("dense", {}), ("half", fitted)):
        for path, layer in layers.zigzag_layers(model).items():
            layer.set_threshold(thresholds.get(path))
        cache, start = cpu.fresh_cache(model), time.process_time()
        rate = cpu.decode_rate(model, cache, TOKENS)
        found[name] = rate, (time.process_time() - start) / TOKENS * 1e3
    if peer:
        found["llama.cpp"] = peer.ask(f"decode {TOKENS} {DEPTH} {threads}"), 0.0
    print(json.dumps({name: [round(one, 2) for one in both] for name, both in found.items()}), flush=True)
    return found


def print_row(row: dict[str, Any]) -> None:
    rates = ", ".join(f"{name} {rate['median']}" for name, rate in row["tokens_per_s"].items())
    ratios = ", ".join(f"{name} {ratio['median']}" for name, ratio in row["ratios"].items())
    print(
        f"{row['shape']}, {row['blocks']} blocks, {row['threads']}T tokens/s: {rates}; {ratios}", flush=True
    )
