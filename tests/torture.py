"""Long tests of files: damaged models by the thousand, and runs killed at random moments.

    python -m tests.torture --minutes 30 [--cases 100000] [--kills 200] [--state FILE]

Each case is named by its seed. The state file sums up the runs of one commit, so that the work can be
spread over many calls; another commit starts anew. Exit code 1 if anything broke its promise. Half of
the minutes go to either part while both have something left.
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

from spqt_cli.calibrate import progress
from spqt_cli.system import files
from tests.conftest import tiny_checkpoint
from tests.lib.hostile import QUICK, attempt, prepare

LONGEST_SECONDS = 10  # a case that takes longer hangs
LARGEST_RSS = 512 << 20
BATCH = 500  # cases per process
LAYERS = 12  # of the checkpoint whose conversion is killed
Job = Callable[[Path, Path], None]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.lib.hostile", "mlx_lm.utils", "spqt_cli.decode.session", "spqt_cli.calibrate.calibrate"]
)


def fuzz(first: int, count: int, sound: dict[str, Path], work: Path) -> None:
    """In a process of its own: try cases, noting each seed before and each outcome after it."""
    slowest = 0.0
    with (work / "log").open("w", buffering=1) as log:
        for seed in range(first, first + count):
            log.write(f"{seed}\n")
            start = time.monotonic()
            try:
                outcome = attempt(seed, sound, work)
            except Exception:
                outcome = "BROKEN " + traceback.format_exc().replace("\n", " | ")
            slowest = max(slowest, time.monotonic() - start)
            if time.monotonic() - start > LONGEST_SECONDS:
                outcome = f"BROKEN took more than {LONGEST_SECONDS} s, then: {outcome}"
            log.write(outcome + "\n")
        log.write(f"USED {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} {slowest}\n")


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
    done = [line for line in lines if not line.isdigit() and not line.startswith("USED ")]
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
    peak, slowest = (float(word) for word in lines[-1].split()[1:])
    state["peak_rss_bytes"] = max(state["peak_rss_bytes"], int(peak))
    state["slowest_seconds"] = round(max(state["slowest_seconds"], slowest), 2)
    if peak > LARGEST_RSS:
        state["failures"].append(f"seeds from {first}: {peak} bytes of memory")
    return count


def convert(source: Path, output: Path) -> None:
    """The job of a process that may be killed."""
    from spqt_cli.convert import convert as command

    command.convert(str(source), output, command.ConvertOptions(group_size=32))


def calibrate(source: Path, output: Path) -> None:
    """Likewise; the converted folder is copied first, outside the race."""
    from spqt_cli.calibrate import calibrate as command

    command.calibrate(output, QUICK, lambda *_: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def announced(started: Any, job: Job, source: Path, output: Path) -> None:
    """The job, after word that its process is up: kills are to strike the work, not the start."""
    started.set()
    job(source, output)


def run_for(job: Job, source: Path, output: Path, seconds: float | None) -> tuple[int | None, float]:
    """Run a job in a process and kill it after `seconds` of work. Its exit code; the seconds it worked."""
    started = CONTEXT.Event()
    process = CONTEXT.Process(target=announced, args=(started, job, source, output))
    process.start()
    started.wait()
    begin = time.monotonic()
    process.join(seconds)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode, time.monotonic() - begin


class Kills:
    """Kills of one kind of job, compared with an unbroken run of it."""

    def __init__(self, job: Job, sound: dict[str, Path], work: Path) -> None:
        self.job, self.work = job, work
        self.source = sound["converted"]
        if job is convert:  # of more layers, so that most of its time is writing
            self.source = tiny_checkpoint(work / "deep", "llama", num_hidden_layers=LAYERS)
        self.before = contents(self.source) if job is calibrate else None
        self.seconds = 0.0
        self.whole = self.unbroken()
        self.between = self.whole
        if self.before is not None:  # a calibration is in config.json; then the card tells of it
            self.between = {**self.whole, "README.md": self.before["README.md"]}

    def start(self) -> Path:
        output = self.work / "out" / "model-x"
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir(parents=True)
        if self.job is calibrate:
            shutil.copytree(self.source, output)
        return output

    def unbroken(self) -> dict[str, bytes]:
        output = self.start()
        code, self.seconds = run_for(self.job, self.source, output, None)
        if code != 0:
            raise RuntimeError(f"{self.job.__name__} fails even unbroken")
        return contents(output)

    def once(self, seed: int) -> tuple[str | None, list[str]]:
        """Kill one to three times, check what is there each time, then finish: what went wrong, and
        where the kills struck. A run that was faster than its kill is in neither.
        """
        rng = random.Random(seed)
        output, found = self.start(), self.before
        strikes: list[str] = []
        for _ in range(rng.randint(1, 3)):
            code, _ = run_for(self.job, self.source, output, rng.uniform(0, self.seconds))
            found = visible(output)
            if found not in (self.before, self.whole, self.between):
                return "half-written output", strikes
            if code == -signal.SIGKILL:
                strikes.append("after" if found == self.whole else "amid" if begun(output) else "before")
            if found == self.whole:
                break
        if found != self.whole and (code := run_for(self.job, self.source, output, None)[0]) != 0:
            return f"the resumed run ended {code}", strikes
        return None if visible(output) == self.whole else "the resumed result is not byte-equal", strikes


def visible(output: Path) -> dict[str, bytes] | None:
    """The files of an output but hidden ones; None where there is no output."""
    if not output.exists():
        return None
    return {name: content for name, content in contents(output).items() if not name.startswith(".")}


def begun(output: Path) -> bool:
    """True if a run that did not finish left its progress."""
    return bool(files.work_folders(output)) or (output / progress.NAME).exists()


def load_state(path: Path) -> dict[str, Any]:
    """The state of this commit's runs, or a new one."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    commit = done.stdout.strip()
    if path.exists():
        state: dict[str, Any] = json.loads(path.read_text())
        if state["commit"] == commit:
            return state
    return {
        "commit": commit, "cases": 0, "outcomes": {}, "failures": [], "peak_rss_bytes": 0,
        "slowest_seconds": 0.0, "kills": {}, "seconds": 0.0,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="stop after about so long")
    parser.add_argument("--cases", type=int, default=100_000, help="damaged models in all")
    parser.add_argument("--kills", type=int, default=200, help="killed runs in all, half of each kind")
    parser.add_argument("--state", type=Path, default=Path("build/torture.json"))
    options = parser.parse_args()
    start = time.monotonic()
    state, end = load_state(options.state), start + options.minutes * 60
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sound = prepare(folder / "sound")
        while state["cases"] < options.cases and time.monotonic() < end - options.minutes * 30:
            count = min(BATCH, options.cases - state["cases"])
            state["cases"] += fuzz_batch(state["cases"], count, sound, state)
            save(options.state, state)
        for job in (convert, calibrate):
            tally = state["kills"].setdefault(job.__name__, {"seeds": 0, "killed": 0})
            if tally["killed"] < options.kills // 2 and time.monotonic() < end:
                kills = Kills(job, sound, folder)
                while tally["killed"] < options.kills // 2 and time.monotonic() < end:
                    kill(kills, tally, state["failures"])
                    save(options.state, state)
    state["seconds"] += round(time.monotonic() - start, 1)
    save(options.state, state)
    print(json.dumps(state))
    return 1 if state["failures"] else 0


def kill(kills: Kills, tally: dict[str, int], failures: list[str]) -> None:
    """Try the next seed and add what came of it; only a run that was really killed counts as one."""
    problem, strikes = kills.once(tally["seeds"])
    if problem:
        failures.append(f"{kills.job.__name__}, kill {tally['seeds']}: {problem}")
    tally["seeds"] += 1
    tally["killed"] += bool(strikes)
    for strike in strikes:
        tally[strike] = tally.get(strike, 0) + 1


def save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
