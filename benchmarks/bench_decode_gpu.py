"""Decode and prompt speed at the shapes of large models, random weights, stock mlx-lm beside.

    python benchmarks/bench_decode_gpu.py --output decode.json
    python benchmarks/bench_decode_gpu.py --output prompts.json --shapes llama-3-8b --depth 0 \\
        --prompt-tokens 512,2048,8192

Runs from a checkout without an installed spqt. For each shape: with --profile first the kernels, whose
crossovers become this device's profile; then 0 %, 25 % and 50 % at every depth. Tables go to stdout;
the JSON file holds every sample and is rewritten after each shape, so that a cut-off run keeps what it
has. A shape that fails is reported and the others still run; the exit code is then 1.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def from_bare_tree() -> None:
    """Makes an uninstalled checkout importable: kernel bodies and presets lie beside the package there."""
    sys.path.insert(0, str(ROOT))
    for name in ("metal", "configs"):
        try:
            __import__(f"spqt_cli.{name}")
        except ModuleNotFoundError:
            (ROOT / "spqt_cli" / name).symlink_to(Path("..") / name)


from_bare_tree()
from spqt_cli.bench import bench, results


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

    options = options_of(shape, arguments, arguments.depth, arguments.prompt_tokens)
    if arguments.profile:
        reports.append(bench.run_kernels(options, show))
        bench.write_profile(reports[-1])
    reports.append(bench.run(options, show))
    return reports


def main() -> int:
    """Measure every shape; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", default="llama-3-8b,llama-3-70b")
    parser.add_argument("--sparsity", default="0.25,0.5", help="beside 0, which is always measured")
    parser.add_argument("--depth", type=numbers, default=[0, 8192])
    parser.add_argument("--prompt-tokens", type=numbers, default=[512], help="'' for none")
    parser.add_argument("--generation-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--blocks", type=int, help="only so many transformer blocks")
    parser.add_argument("--dtype", help="default: the model's own")
    parser.add_argument("--profile", action="store_true", help="measure kernels first and follow them")
    parser.add_argument("--commit", help="where git can't tell it")
    arguments = parser.parse_args()
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
            documents.append(results.plain(report))
        arguments.output.write_text(json.dumps(documents) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
