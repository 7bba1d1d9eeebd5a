"""A real model on the CPU beside llama.cpp on GGUF files of it: tokens/s, CPU time and bytes read a token.

    python -m benchmarks.cpu_model FOLDER --llama-cpp SOURCES --gguf MODEL.Q4_K_M.gguf --q4-0 \
        --sparsity 0.25,0.4,0.5 --prompt 128,512 --threads 1,2 --output OUT

FOLDER is converted and calibrated. --q4-0 has llama.cpp write a Q4_0 file of the first --gguf and runs it as
well. Variants take turns in every repetition; ratios are to the fastest llama.cpp row of the same turns. CPU
time is what the process spent, so other work on the machine counts less in it than in seconds. Bytes are
those of the weights that a token reads, and their share of what so many threads read of memory alone. The
last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

mx.set_default_device(mx.cpu)

from benchmarks.cpu import decode_rate, read_bandwidth, summary
from benchmarks.machine import facts
from benchmarks.peer import Peer
from spqt_cli.backends import cpu
from spqt_cli.decode import session
from spqt_cli.format.folder import Folder

Q4_0 = "llama.cpp Q4_0"


class Sample(NamedTuple):
    """Tokens a second, and milliseconds of CPU time a token."""

    rate: float
    cpu_ms: float


Turn = Callable[[int], Sample]  # by threads


def main() -> None:
    options = parse()
    usable, reason = cpu.status()
    if not usable:
        raise SystemExit(f"the CPU kernels can't be measured: {reason}")
    result: dict[str, Any] = {"machine": facts(), "kernels": cpu.status()[1], "model": options.folder.name}
    print(result["machine"], result["kernels"], sep="\n", flush=True)
    read = {threads: round(read_bandwidth(threads), 1) for threads in options.threads}
    result |= {"read_gb_per_s": read, "load_before": os.getloadavg(), "decode": [], "prompt": []}
    with tempfile.TemporaryDirectory() as folder:
        peers = {name: peer(options.llama_cpp, file) for name, file in files(options, Path(folder)).items()}
        loaded = session.load(options.folder)
        sizes = bytes_of(loaded, options)
        for threads in options.threads:
            cpu.set_threads(threads)
            turns = decoding(loaded, peers, options)
            row = in_turns(turns, threads, options.repetitions)
            shares = {
                name: round(sizes[name] * row[name]["tokens_per_s"]["median"] / read[threads] / 1e9, 3)
                for name in sizes
            }
            result["decode"].append({"threads": threads, "variants": row, "share_of_reading": shares})
            show(f"decode, {threads} threads", row, shares)
            for count in options.prompt:
                row = in_turns(prompting(loaded, peers, count), threads, max(2, options.repetitions // 2))
                result["prompt"].append({"threads": threads, "tokens": count, "variants": row})
                show(f"prompt of {count}, {threads} threads", row, {})
    result |= {"bytes_per_token": sizes, "load_after": os.getloadavg()}
    document = json.dumps(result)
    if options.output:
        options.output.write_text(document + "\n")
    print(document)


def files(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """llama.cpp's variants and their files; the one of Q4_0 is written into the folder."""
    if not options.llama_cpp:
        return {}
    found = {f"llama.cpp {file.stem.rpartition('.')[2] or file.stem}": file for file in options.gguf}
    if options.q4_0:
        found[Q4_0] = folder / "q4_0.gguf"
        Peer(options.llama_cpp).quantize(options.gguf[0], found[Q4_0])
    return found


def peer(sources: Path, file: Path) -> Peer:
    """A program of its own for each file, stopped between its turns."""
    found = Peer(sources)
    found.load(file)
    return found


def decoding(loaded: session.Loaded, peers: dict[str, Peer], options: argparse.Namespace) -> dict[str, Turn]:
    """The variants of decoding."""
    from mlx_lm.models.cache import make_prompt_cache

    def ours(sparsity: float) -> Turn:
        def turn(_: int) -> Sample:
            set_to(loaded, sparsity)
            before = time.process_time()
            rate = decode_rate(loaded.model, make_prompt_cache(loaded.model), options.tokens)
            return Sample(rate, (time.process_time() - before) / options.tokens * 1e3)

        return turn

    found = {name: asked(one, f"decode {options.tokens} 1", options.tokens) for name, one in peers.items()}
    return found | {named(sparsity): ours(sparsity) for sparsity in (0.0, *options.sparsity)}


def prompting(loaded: session.Loaded, peers: dict[str, Peer], count: int) -> dict[str, Turn]:
    """The variants of a prompt; ours is dense there."""
    from mlx_lm.models.cache import make_prompt_cache

    size = loaded.folder.size("vocab_size") or 1000
    text = mx.random.randint(0, size, (1, count))

    def ours(_: int) -> Sample:
        before, started = time.process_time(), time.perf_counter()
        mx.eval(loaded.model(text, cache=make_prompt_cache(loaded.model)))
        seconds = time.perf_counter() - started
        return Sample(count / seconds, (time.process_time() - before) / count * 1e3)

    return {name: asked(one, f"prompt {count}", count) for name, one in peers.items()} | {"spqt": ours}


def asked(one: Peer, command: str, count: int) -> Turn:
    """A turn of llama.cpp."""

    def turn(threads: int) -> Sample:
        before = one.cpu_seconds()
        rate = one.ask(f"{command} {threads}")
        return Sample(rate, (one.cpu_seconds() - before) / count * 1e3)

    return turn


def in_turns(turns: dict[str, Turn], threads: int, repetitions: int) -> dict[str, dict[str, Any]]:
    """Each variant's medians and ranges, and its ratio to the fastest of llama.cpp in the same round."""
    rounds = [{name: turn(threads) for name, turn in turns.items()} for _ in range(repetitions + 1)][1:]
    rows: dict[str, dict[str, Any]] = {}
    for name in turns:
        row: dict[str, Any] = {
            "tokens_per_s": summary([one[name].rate for one in rounds]),
            "cpu_ms_per_token": summary([one[name].cpu_ms for one in rounds]),
        }
        peers = [[one[other].rate for other in turns if other.startswith("llama")] for one in rounds]
        if all(peers):
            ratios = [one[name].rate / max(rates) for one, rates in zip(rounds, peers, strict=True)]
            row["ratio"] = {
                "median": round(statistics.median(ratios), 3),
                "min": round(min(ratios), 3),
                "max": round(max(ratios), 3),
            }
        rows[name] = row
    return rows


def show(title: str, rows: dict[str, dict[str, Any]], shares: dict[str, float]) -> None:
    """Print a table."""
    print(f"{title}: tokens/s, CPU ms a token, x the faster llama.cpp, of the memory's speed")
    for name, row in rows.items():
        rate, spent = row["tokens_per_s"], row["cpu_ms_per_token"]
        ratio = row.get("ratio")
        against = f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""
        share = f"{shares[name]:.0%}" if name in shares else ""
        print(f"  {name:>18} {rate['median']:8.1f} {spent['median']:8.2f}  {against} {share}", flush=True)


def set_to(loaded: session.Loaded, sparsity: float) -> None:
    if sparsity:
        session.set_sparsity(loaded, sparsity)
    else:
        session.set_dense(loaded)


def bytes_of(loaded: session.Loaded, options: argparse.Namespace) -> dict[str, float]:
    """Weights that a token of each of our variants reads, by what its sparsity asks for."""
    other, zigzag = session.weight_bytes(loaded.model, loaded.config)
    return {
        named(sparsity): other + (1 - sparsity) * sum(zigzag.values())
        for sparsity in (0.0, *options.sparsity)
    }


def named(sparsity: float) -> str:
    return f"spqt {sparsity:.0%}" if sparsity else "spqt dense"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=lambda path: Folder(Path(path)).path)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp checkout, or llama-cpp-python's sources")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="of the same model, for llama.cpp")
    parser.add_argument("--q4-0", action="store_true", help="also as Q4_0, made from the first --gguf")
    parser.add_argument("--sparsity", type=numbers(float), default="0.25,0.4,0.5")
    parser.add_argument("--prompt", type=numbers(int), default="128,512", help="lengths")
    parser.add_argument("--threads", type=numbers(int), default="1,2")
    parser.add_argument("--tokens", type=int, default=48, help="that are decoded in a turn")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the JSON document")
    options = parser.parse_args()
    if options.llama_cpp and not options.gguf:
        parser.error("llama.cpp needs a --gguf")
    return options


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """A parser of "1,2"; "" gives none."""
    return lambda text: [kind(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
