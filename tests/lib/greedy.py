"""One process's part of a comparison: greedy tokens of converted folders, and the memory that they took.

    python -m tests.lib.greedy FOLDER... [--tokens N]

Alone it runs each folder as one process does; among several tensor parallel, and as a pipeline where mlx-lm
has one. The first process prints, per folder, a line of JSON: way -> {"dense", "sparse": tokens; "peak":
bytes}, or {"reason"}.
"""

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from spqt_cli.decode import generate, parallel, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.errors import SpqtError
from tests.lib import settled

TOKENS = 8
PROMPT = "pack my box with five dozen liquor jugs"


def written(loaded: session.Loaded, count: int) -> tuple[list[int], float]:
    """(greedy tokens, the fraction of Zigzag weights that was skipped)."""
    prompt, ids = generate.encode(loaded, Prompt(PROMPT)), []
    options = Options(max_tokens=count, on_token=ids.append)
    *_, statistics = generate.stream(loaded, prompt, Sampling(), options)
    return ids, statistics.sparsity


def tokens_of(folder: Path, count: int, processes: parallel.Processes | None) -> dict[str, Any]:
    """Greedy tokens of a folder, and MLX's peak memory with loading, the largest of any process."""
    found: dict[str, Any] = {}
    for name, dense in (("dense", True), ("sparse", False)):
        gc.collect()  # a model refers to itself
        mx.clear_cache()
        mx.reset_peak_memory()
        pipeline = None if processes is None else processes.pipeline
        loaded = session.load(folder, dense=dense, pipeline=pipeline)
        peak = mx.get_peak_memory()  # a generation counts anew
        if not dense:
            settled.put(loaded, json.loads((folder / settled.FILE).read_text()))
        found[name], found[f"{name}_skipped"] = written(loaded, count)
        peak = max(peak, mx.get_peak_memory())
        peak = float(peak) if processes is None else processes.all([peak], mx.distributed.all_max)[0]
        found["peak"] = max(peak, found.get("peak", 0.0))
        del loaded
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
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
