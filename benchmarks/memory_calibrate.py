"""Peak memory of `spqt calibrate --stream` on synthetic models of 4 and 16 layers of one width.

    python benchmarks/memory_calibrate.py [--hidden 1024] [--layers 4 16] [--method M] [--folder DIR]

Each calibration runs in a process of its own; the figure is that process's peak resident set size, once
block by block and once with the whole model loaded. The rule: block by block, the peak grows from the first
to the last number of layers by less than a quarter of what the weights grow by. The last line of stdout
is one JSON document; the exit code is 1 if the rule is broken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import memory

CHILD = "import sys; from benchmarks.memory_calibrate import child; child(*sys.argv[1:])"
TOKENS, WINDOW = 256, 64


def child(folder: str, text: str, stream: str, method: str) -> None:
    """Calibrate, and print the peak resident set size in bytes, the seconds taken and the share reached."""
    from spqt_cli.calibrate import calibrate

    start = time.perf_counter()
    options = calibrate.CalibrateOptions(
        sparsity=0.4,
        data=Path(text),
        tokens=TOKENS,
        window=WINDOW,
        method=method,
        stream=stream == "stream",
    )
    result = calibrate.calibrate(Path(folder), options, lambda *_: None)
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": memory.peak_bytes(), "seconds": seconds, "realised": result.realised}))


def measure(folder: Path, hidden: int, layers: int, method: str) -> dict[str, object]:
    """One row: a synthetic model, converted, then calibrated both ways."""
    from spqt_cli.calibrate.stream import paging
    from spqt_cli.convert import convert

    source, model = folder / f"llama-{hidden}-{layers}", folder / f"converted-{hidden}-{layers}"
    memory.write_checkpoint(source, hidden, layers)
    convert.convert(str(source), model, convert.ConvertOptions(), lambda *_: None)
    text = folder / "text.txt"
    text.write_text("a" * (TOKENS + WINDOW))
    row: dict[str, object] = {"layers": layers, "weight_bytes": paging.shard_bytes(model)}
    for way in ("stream", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, model, text, way, method],
            cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        row[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{layers:>3} layers, {way}: {row[way]}", file=sys.stderr)
    return row


def main() -> int:
    import machine  # lies beside this script

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width; a multiple of 256")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--folder", type=Path, help="where the models go; default: a temporary folder")
    parser.add_argument("--method", default="uniform", help="uniform, paper or fast")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        rows = [measure(Path(temporary), options.hidden, layers, options.method) for layers in options.layers]
    grown = rows[-1]["stream"]["peak_bytes"] - rows[0]["stream"]["peak_bytes"]
    holds = grown < (rows[-1]["weight_bytes"] - rows[0]["weight_bytes"]) / 4
    print(json.dumps({"rows": rows, "grown_bytes": grown, "holds": holds, "machine": machine.facts()}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
