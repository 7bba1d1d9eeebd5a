"""Long tests of files: damaged models by the thousand, and runs killed at random moments.

    python -m tests.torture --minutes 30 [--cases 100000] [--kills 200] [--state FILE]

Each case is named by its seed. The state file sums up the runs of one commit, so that the work can be
spread over many calls; another commit starts anew. Exit code 1 if anything broke its promise.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile import attempt, prepare

LONGEST_SECONDS = 10  # a case that takes longer hangs
LARGEST_RSS = 512 << 20
BATCH = 500  # cases per process
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.hostile", "mlx_lm.utils", "spqt_cli.model", "spqt_cli.calibrate"])


def fuzz(first: int, count: int, sound: dict[str, Path], work: Path) -> None:
    """In a process of its own: try cases, noting each seed before and each outcome after it."""
    with (work / "log").open("w", buffering=1) as log:
        for seed in range(first, first + count):
            log.write(f"{seed}\n")
            try:
                log.write(attempt(seed, sound, work) + "\n")
            except Exception:
                log.write("BROKEN " + traceback.format_exc().replace("\n", " | ") + "\n")
        log.write(f"RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")


def fuzz_batch(first: int, count: int, sound: dict[str, Path], state: dict[str, Any]) -> int:
    """Run a batch under watch and add its outcomes to the state; the number of cases tried."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        log = work / "log"
        log.touch()
        process = CONTEXT.Process(target=fuzz, args=(first, count, sound, work))
        process.start()
        while process.is_alive():
            process.join(0.2)
            if time.time() - log.stat().st_mtime > LONGEST_SECONDS + 20:  # twenty to start up
                process.kill()
                process.join()
        lines = log.read_text().splitlines()
    done = [line for line in lines if not line.isdigit() and not line.startswith("RSS ")]
    for line in done:
        kind = "broken" if line.startswith("BROKEN") else line
        state["outcomes"][kind] = state["outcomes"].get(kind, 0) + 1
    seeds = [int(line) for line in lines if line.isdigit()]
    for seed, line in zip(seeds, done, strict=False):
        if line.startswith("BROKEN"):
            state["failures"].append(f"seed {seed}: {line}")
    if process.exitcode != 0:
        state["failures"].append(
            f"seed {seeds[-1] if seeds else first}: the process ended {process.exitcode}"
        )
        return len(seeds) or 1
    peak = int(lines[-1].split()[1])
    state["peak_rss_bytes"] = max(state["peak_rss_bytes"], peak)
    if peak > LARGEST_RSS:
        state["failures"].append(f"seeds from {first}: {peak} bytes of memory")
    return count


def convert(source: Path, output: Path) -> None:
    """The job of a process that may be killed."""
    from spqt_cli import convert as command

    command.convert(str(source), output, command.ConvertOptions(group_size=32))


def calibrate(source: Path, output: Path) -> None:
    """Likewise; the converted folder is copied first, outside the race."""
    from spqt_cli import calibrate as command

    options = command.CalibrateOptions(sparsity=0.3, tokens=256, window=64, method="uniform")
    command.calibrate(output, options, lambda *_: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_for(
    job: Callable[[Path, Path], None], source: Path, output: Path, seconds: float | None
) -> int | None:
    """Run a job in a process; kill it after `seconds`. Its exit code."""
    process = CONTEXT.Process(target=job, args=(source, output))
    process.start()
    process.join(seconds)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


class Kills:
    """Kills of one kind of job, compared with an unbroken run of it."""

    def __init__(self, job: Callable[[Path, Path], None], sound: dict[str, Path], work: Path) -> None:
        self.job, self.work = job, work
        self.source = sound["converted"] if job is calibrate else sound["llama"]
        self.before = contents(self.source) if job is calibrate else None
        start = time.monotonic()
        self.whole = self.unbroken()
        self.seconds = time.monotonic() - start

    def start(self) -> Path:
        output = self.work / "out" / "model-x"
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir(parents=True)
        if self.job is calibrate:
            shutil.copytree(self.source, output)
        return output

    def unbroken(self) -> dict[str, bytes]:
        output = self.start()
        if run_for(self.job, self.source, output, None) != 0:
            raise RuntimeError(f"{self.job.__name__} fails even unbroken")
        return contents(output)

    def once(self, seed: int) -> str | None:
        """Kill one to three times, check what is there each time, then finish; what went wrong."""
        rng = random.Random(seed)
        output = self.start()
        for _ in range(rng.randint(1, 3)):
            run_for(self.job, self.source, output, rng.uniform(0, self.seconds))
            found = (
                {k: v for k, v in contents(output).items() if not k.startswith(".")}
                if output.exists()
                else None
            )
            if found not in (self.before, self.whole):
                return "half-written output"
            if found == self.whole:
                break
        if found != self.whole and (code := run_for(self.job, self.source, output, None)) != 0:
            return f"the resumed run ended {code}"
        left = {key: value for key, value in contents(output).items() if not key.startswith(".")}
        return None if left == self.whole else "the resumed result is not byte-equal"


def load_state(path: Path) -> dict[str, Any]:
    """The state of this commit's runs, or a new one."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    commit = done.stdout.strip()
    if path.exists():
        state: dict[str, Any] = json.loads(path.read_text())
        if state["commit"] == commit:
            return state
    return {"commit": commit, "cases": 0, "outcomes": {}, "failures": [], "peak_rss_bytes": 0, "kills": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="stop after about so long")
    parser.add_argument("--cases", type=int, default=100_000, help="damaged models in all")
    parser.add_argument("--kills", type=int, default=200, help="killed runs in all, half of each kind")
    parser.add_argument("--state", type=Path, default=Path("build/torture.json"))
    options = parser.parse_args()
    state, end = load_state(options.state), time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sound = prepare(folder / "sound")
        while state["cases"] < options.cases and time.monotonic() < end - options.minutes * 30:
            count = min(BATCH, options.cases - state["cases"])
            state["cases"] += fuzz_batch(state["cases"], count, sound, state)
            save(options.state, state)
        for job in (convert, calibrate):
            count = state["kills"].setdefault(job.__name__, 0)
            if count < options.kills // 2 and time.monotonic() < end:
                kills = Kills(job, sound, folder)
                while count < options.kills // 2 and time.monotonic() < end:
                    if problem := kills.once(count):
                        state["failures"].append(f"{job.__name__}, kill {count}: {problem}")
                    count += 1
                    state["kills"][job.__name__] = count
                    save(options.state, state)
    print(json.dumps(state))
    return 1 if state["failures"] else 0


def save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
