"""Every architecture of the installed mlx-lm, converted, calibrated, run, and held against its definition.

    python -m tests.convert.architectures              against docs/architectures.md; exit 1 if a row changed
    python -m tests.convert.architectures --write      write that table anew
    python -m tests.convert.architectures --one NAME   one architecture, as JSON

Each architecture has a process of its own, so that one which ends its process is one row.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests import ROOT
from tests.lib import architecture_configs
from tests.lib.architecture_check import Row, examine

PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- rows -->\n", "<!-- end of rows -->\n"
TIMEOUT = 300  # seconds for one architecture

HEADER = ("architecture", "Zigzag layers", "of the bytes", "calibrated by", "not reached", "exact zeros",
          "dense", "sparse", "fitted", "left out")  # fmt: skip


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", metavar="NAME")
    wished = parser.parse_args()
    if wished.one:
        with tempfile.TemporaryDirectory() as folder:
            row = examine(wished.one, Path(folder))
        print("\n" + json.dumps(row and asdict(row)))
        return 0
    rows = survey(architecture_configs.names())
    table = lines(rows)
    print("\n".join(table))
    wrong = [row.name for row in rows if not row.right]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return write(table) if wished.write else compare(table)


def survey(names: list[str]) -> list[Row]:
    """A row for each architecture, as many at a time as there are processors."""
    with concurrent.futures.ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
        return [row for row in pool.map(_one, names) if row is not None]


def _one(name: str) -> Row | None:
    """The row that a process of its own finds; a failure is a row that is wrong."""
    command = [sys.executable, "-m", "tests.convert.architectures", "--one", name]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Row(name, failed=f"took more than {TIMEOUT} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Row(name, failed=last)
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        return None
    row = Row(**found)
    print(f"{name}: {time.monotonic() - started:.0f} s, {row.dense:.1e}, {row.sparse:.1e}", file=sys.stderr)
    return row


def lines(rows: list[Row]) -> list[str]:
    """The table of the page."""
    head = [HEADER, ("---",) * len(HEADER)]
    return [f"| {' | '.join(cells)} |" for cells in (*head, *(row.cells() for row in rows))]


def write(table: list[str]) -> int:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(table) + "\n" + END + rest.partition(END)[2])
    return 0


def compare(table: list[str]) -> int:
    """0 where the page has this very table; else the rows that differ are printed."""
    stored = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    if stored == table:
        return 0
    for line in sorted(set(stored) ^ set(table)):
        print(("gone: " if line in stored else "new:  ") + line, file=sys.stderr)
    print(f"{PAGE.name} says otherwise; if that is right: make architectures WRITE=--write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
