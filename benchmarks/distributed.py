"""Decode speed of one and of several processes at a known model's shape, random weights, tensor parallel.

    python -m benchmarks.distributed speed --shape llama-3-70b --output OUT      # GPUs of one host
    python -m benchmarks.distributed speed --shape llama-3.2-1b --blocks 2 --backend ring  # CPUs, loopback

`speed` starts the processes itself, in stages: ours in several, ours in one, stock mlx-lm in several and in
one; in each, variants take turns. Each line is printed as it is measured; a stage that fails or takes too
long costs the others nothing, and --limit ends all. Rates are of mlx-lm's own loop; memory is MLX's peak of
one process.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, facts, from_bare_tree

WARM_STEPS = 8  # for thresholds


@dataclass(frozen=True)
class Stage:
    """Variants that are measured by one start of so many processes."""

    name: str
    processes: int
    side: str  # ours or stock
    environment: tuple[tuple[str, str], ...] = ()


def stages(arguments: argparse.Namespace) -> list[Stage]:
    """What is measured, the most wanted first."""
    count = arguments.processes
    found = [Stage(f"ours, {count} processes", count, "ours"), Stage("ours, 1 process", 1, "ours")]
    found += [Stage(f"stock, {count} processes", count, "stock"), Stage("stock, 1 process", 1, "stock")]
    if arguments.backend == "nccl":
        plain = (("MLX_USE_CUDA_GRAPHS", "0"),)
        found.append(Stage(f"ours, {count} processes, no CUDA graphs", count, "ours", plain))
    return [one for one in found if arguments.only is None or arguments.only in one.name]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        found = []
        for _ in range(count):
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


def environments(stage: Stage, backend: str, folder: Path) -> list[dict[str, str]]:
    """What mlx.launch would set for each process, on this host."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    known |= dict(stage.environment)
    if stage.processes == 1:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return [known | ({"CUDA_VISIBLE_DEVICES": devices} if backend == "nccl" else {})]
    if backend == "ring":
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(stage.processes)]))
        return [
            known | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(stage.processes)
        ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(one) for one in range(stage.processes)]
    port = free_ports(1)[0]
    common = known | {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port)}
    common |= {"MLX_WORLD_SIZE": str(stage.processes)}
    return [
        common | {"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": devices[rank]}
        for rank in range(stage.processes)
    ]


def run_stage(stage: Stage, arguments: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """The rows of a stage, as many as came; every process has ended afterwards."""
    command = [sys.executable, "-m", "benchmarks.distributed", "part", "--side", stage.side]
    for name in (
        "shape",
        "blocks",
        "vocabulary",
        "sparsity",
        "repetitions",
        "generation_tokens",
        "dtype",
        "device",
    ):
        if (value := getattr(arguments, name)) is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        children = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=one,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank, one in enumerate(environments(stage, arguments.backend, Path(folder)))
        ]
        reader = threading.Thread(target=read_rows, args=(children[0], found), daemon=True)
        reader.start()
        wait(children, until)
        reader.join(5)
    rows = [{"stage": stage.name, "processes": stage.processes, **row} for row in found.values()]
    for row in rows:
        print(line_of(row), flush=True)
    if failed := [child.returncode for child in children if child.returncode]:
        print(f"| {stage.name} | ended with {failed[0]} | | | |", flush=True)
    return rows


def read_rows(child: subprocess.Popen[str], found: dict[str, dict[str, Any]]) -> None:
    """Take what the first process writes: of each variant the last row has all repetitions so far."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            row = json.loads(line)
            found[row["variant"]] = row
        else:
            print(line, end="", file=sys.stderr)


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    memory = " / ".join(f"{size / 1e9:.2f}" for size in row["peak_bytes"])
    rates = row["rates"]
    numbers = f"{statistics.median(rates):.1f} | {min(rates):.1f}-{max(rates):.1f} | {memory}"
    return f"| {row['stage']} | {row['variant']} | {numbers} |"


def wait(children: list[subprocess.Popen[str]], until: float) -> None:
    """Until all have ended; others end with one that failed, and all at the time limit."""
    grace = None
    while any(child.poll() is None for child in children):
        if grace is None and any(child.poll() for child in children):
            grace = time.monotonic() + 5
        if time.monotonic() > min(until, grace or until):
            for child in children:
                child.kill()
        time.sleep(0.05)


def measure_speed(arguments: argparse.Namespace) -> int:
    """All stages, a table line by line, then the ratios."""
    until = time.monotonic() + arguments.limit
    print(f"{arguments.shape}, {arguments.blocks or 'all'} blocks, random weights, {arguments.backend}")
    print("| stage | variant | tok/s | range | peak GB by process |\n|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}
    planned = stages(arguments)
    for at, stage in enumerate(planned):
        left = until - time.monotonic()
        if left < 5:
            print(f"| {stage.name} | no time left | | | |", flush=True)
            continue
        share = left if at == len(planned) - 1 else max(left / 2, left / (len(planned) - at))
        rows += run_stage(stage, arguments, time.monotonic() + share)
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print("\n" + "\n".join(ratios(rows, arguments.processes)), flush=True)
    document["machine"] = next((row["machine"] for row in rows), None)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if len({row["stage"] for row in rows}) == len(planned) else 1


def ratios(rows: list[dict[str, Any]], count: int) -> list[str]:
    """What several processes gain over one, of medians."""
    rates = {(row["stage"], row["variant"]): statistics.median(row["rates"]) for row in rows}
    found = []
    for side, variants in (("ours", ("dense", "sparse")), ("stock", ("stock",))):
        for variant in variants:
            several, one = (
                rates.get((f"{side}, {number}", variant)) for number in (f"{count} processes", "1 process")
            )
            if several and one:
                found.append(f"{variant}: {count} processes {several / one:.2f} x one")
    for several in ("1 process", f"{count} processes"):
        stock = rates.get((f"stock, {several}", "stock"))
        for variant in ("dense", "sparse"):
            if stock and (ours := rates.get((f"ours, {several}", variant))):
                found.append(f"{variant}, {several}: {ours / stock:.2f} x stock in {several}")
    one, several = rates.get(("ours, 1 process", "dense")), rates.get((f"ours, {count} processes", "sparse"))
    if one and several:
        found.append(f"sparse in {count} processes: {several / one:.2f} x dense in one")
    return found


def measure_part(arguments: argparse.Namespace) -> int:
    """One process of a stage; the first one writes a row for each variant."""
    from_bare_tree()
    import mlx.core as mx

    if arguments.device:
        mx.set_default_device(mx.Device(getattr(mx, arguments.device)))
    from spqt_cli.bench import models, shapes
    from spqt_cli.decode import parallel

    processes = parallel.join()
    config = shapes.config(arguments.shape, arguments.blocks)
    config["vocab_size"] = arguments.vocabulary or config["vocab_size"]
    cpu = mx.default_device().type == mx.DeviceType.cpu
    form = 4, 64, models.stored_dtype(config, arguments.dtype or ("float32" if cpu else None))
    mx.random.seed(models.SEED)
    say(processes, "making the model")
    if arguments.side == "stock":
        model = models.random_stock(config, *form, processes=processes)
    else:
        model = models.random_model(config, *form, processes=processes)
        models.evaluate(model)
    say(processes, "measuring")
    for row in measured(model, arguments, config):
        peaks = [float(mx.get_peak_memory())]
        if processes is not None:
            peaks = processes.all([peaks[0] * (rank == processes.rank) for rank in range(processes.size)])
        say(processes, f"{row['variant']}: {row['rates'][-1]:.1f} tok/s")
        if processes is None or processes.rank == 0:
            print(json.dumps(row | {"peak_bytes": peaks, "machine": facts()}), flush=True)
    return 0


def say(processes: Any, text: str) -> None:
    """A line of progress from the first process."""
    if processes is None or processes.rank == 0:
        print(f"{text} ({time.process_time():.0f} s)", file=sys.stderr, flush=True)


def measured(model: Any, arguments: argparse.Namespace, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row after each repetition of each variant: its rates so far, tokens per second."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from spqt_cli.bench import model_timing, models
    from spqt_cli.decode import only_mlx
    from spqt_cli.decode.layers import zigzag_layers

    stock = arguments.side == "stock"
    mx.random.seed(models.SEED)
    text = mx.random.randint(0, config["vocab_size"], (WARM_STEPS + arguments.generation_tokens,))
    thresholds: dict[str, Any] = {}
    if not stock:
        thresholds = models.fit_thresholds(model, arguments.sparsity, text, make_prompt_cache(model))
    layers = zigzag_layers(model)
    rates: dict[str, list[float]] = {name: [] for name in (("stock",) if stock else ("sparse", "dense"))}
    tokens = model_timing.WARM_TOKENS + arguments.generation_tokens
    mx.reset_peak_memory()
    for repetition in range(arguments.repetitions + 1):
        for name, found in rates.items():
            for path, layer in layers.items():
                layer.set_threshold(thresholds[path] if name == "sparse" else None)
            with only_mlx.only_mlx() if stock else contextlib.nullcontext():
                if stock:
                    only_mlx.check_unpatched(model)
                rate = model_timing._decode_rate(model, text[:1], make_prompt_cache(model), tokens)
            if repetition:  # the first one warms up
                found.append(rate)
                yield {"variant": name, "rates": found}


COMMANDS = {"speed": measure_speed, "part": measure_part}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS, help="`part` is what `speed` starts")
    parser.add_argument("--shape", default="llama-3-70b")
    parser.add_argument("--blocks", type=int, help="transformer blocks: all")
    parser.add_argument("--vocabulary", type=int, help="of so many tokens, to try the command")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "ring"), default="nccl")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--generation-tokens", type=int, default=32)
    parser.add_argument("--dtype", help="default: the shape's own, on a CPU float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's own choice")
    parser.add_argument("--limit", type=float, default=300, help="seconds in all")
    parser.add_argument("--only", help="stages whose name holds this")
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after each stage")
    parser.add_argument("--side", choices=("ours", "stock"), default="ours", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return COMMANDS[arguments.what](arguments)


if __name__ == "__main__":
    sys.exit(main())
