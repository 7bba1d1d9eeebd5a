"""One process's part of a comparison: greedy tokens of converted folders, and the memory that they took.

    python -m tests.lib.greedy FOLDER... [--tokens N]

Alone it runs each folder as one process does; among several tensor parallel, and as a pipeline where mlx-lm
has one. The first process prints, per folder, a line of JSON: way -> {"dense", "sparse": tokens; "peak":
bytes}, or {"reason"}.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from spqt_cli.decode import generate, parallel, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.errors import SpqtError

PROMPT = "pack my box with five dozen liquor jugs"


def tokens_of(folder: Path, count: int, processes: parallel.Processes | None) -> dict[str, Any]:
    """Greedy tokens of a folder, and MLX's peak memory with loading, the largest of any process."""
    found: dict[str, Any] = {}
    for name, dense in (("dense", True), ("sparse", False)):
        mx.clear_cache()
        mx.reset_peak_memory()
        loaded = session.load(folder, dense=dense, processes=processes)
        peak = mx.get_peak_memory()
        prompt = generate.encode(loaded, Prompt(PROMPT))
        ids: list[int] = []
        *_, statistics = generate.stream(
            loaded, prompt, Sampling(), Options(max_tokens=count, on_token=ids.append)
        )
        found[name] = ids
        found[f"{name}_skipped"] = statistics.sparsity
        peak = max(peak, mx.get_peak_memory())
        found["peak"] = peak if processes is None else processes.all([peak], mx.distributed.all_max)[0]
        del loaded
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    wished = parser.parse_args()
    together = parallel.join()
    for folder in wished.folders:
        ways: dict[str, Any] = {}
        for way in ("one",) if together is None else ("tensor", "pipeline"):
            processes = together and replace(together, pipeline=way == "pipeline")
            try:
                ways[way] = tokens_of(folder, wished.tokens, processes)
            except SpqtError as error:
                ways[way] = {"reason": f"{error.cause} ({error.hint})"}
        if together is None or together.rank == 0:
            print(json.dumps(ways), flush=True)


if __name__ == "__main__":
    main()
