"""Time of `spqt convert` at two commits, run in turns on the same checkpoint.

    git worktree add ../first 2207960
    python -m benchmarks.convert_time ../first . MODEL... [--repeats 5] [--synthetic 10] [--output FILE]

Each conversion is a process of its own; its time is all of it, from the start of Python to the renamed
folder. CPU time is user plus system of that process; on a machine with other work wall time means little.
The last line of stdout is one JSON document; the exit code is 1 if the second checkout takes over 5 % more
CPU time at the median.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, memory

SLACK = 1.05
WIDTH = 2048  # of the synthetic model
# An editable install comes before every path; the checkout's own package must win.
CHILD = """
import importlib.util
import sys
checkout, source, output = sys.argv[1:]
sys.meta_path[:] = [one for one in sys.meta_path if "ScikitBuild" not in type(one).__name__]
sys.path.insert(0, checkout)
from pathlib import Path
import spqt_cli
assert Path(spqt_cli.__file__).is_relative_to(checkout), spqt_cli.__file__
for name in ("configs", "metal"):  # which an installation puts into the package
    full, file = f"spqt_cli.{name}", Path(checkout, name, "__init__.py")
    spec = importlib.util.spec_from_file_location(full, file, submodule_search_locations=[str(file.parent)])
    sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[full])
    setattr(spqt_cli, name, sys.modules[full])
from spqt_cli.__main__ import main
sys.argv = ["spqt", "convert", source, "-o", output]
sys.exit(main())
"""


def once(checkout: Path, source: Path, output: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one conversion, whose output is deleted again."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", CHILD, checkout, source, output], cwd=checkout)
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{checkout} can't convert {source}")
    shutil.rmtree(output)
    return wall, used.ru_utime + used.ru_stime


def compare(checkouts: list[Path], source: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """One row: median, least and largest seconds of each checkout; one round before does not count."""
    times: list[list[tuple[float, float]]] = [[] for _ in checkouts]
    for at in range(repeats + 1):
        for checkout, found in zip(checkouts, times, strict=True):
            seconds = once(checkout, source, folder / "output")
            if at:
                found.append(seconds)
    row: dict[str, Any] = {"source": source.name}
    for what, column in (("wall", 0), ("cpu", 1)):
        for label, found in zip(("first", "second"), times, strict=True):
            chosen = [seconds[column] for seconds in found]
            row[f"{label}_{what}_seconds"] = {
                "median": statistics.median(chosen), "least": min(chosen), "largest": max(chosen),
            }  # fmt: skip
    medians = [statistics.median(seconds[1] for seconds in found) for found in times]
    row["cpu_ratio"] = medians[1] / medians[0]
    print(
        f"{source.name}: CPU {medians[0]:.2f} -> {medians[1]:.2f} s, {row['cpu_ratio']:.3f} times",
        file=sys.stderr,
    )
    return row


def commit(checkout: Path) -> str:
    command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, help="a checkout")
    parser.add_argument("second", type=Path, help="another")
    parser.add_argument("sources", type=Path, nargs="*", help="model folders")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--synthetic", type=int, default=0, help=f"layers of a model {WIDTH} wide, to add")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="a .json file for the result")
    options = parser.parse_args()
    checkouts = [options.first.resolve(), options.second.resolve()]
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, sources = Path(temporary), [source.resolve() for source in options.sources]
        if options.synthetic:
            sources.append(folder / f"synthetic-{WIDTH}-{options.synthetic}")
            memory.write_checkpoint(sources[-1], WIDTH, options.synthetic)
        rows = [compare(checkouts, source, options.repeats, folder) for source in sources]
    result = {"rows": rows, "first": commit(options.first), "second": commit(options.second)}
    text = json.dumps({**result, "repeats": options.repeats, "machine": machine.facts()})
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0 if all(row["cpu_ratio"] <= SLACK for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
