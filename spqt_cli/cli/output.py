"""What every command prints: progress on stderr, results as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from spqt_cli.errors import SpqtError, Terminated
from spqt_cli.system.terminal import harmless


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[float, float, str], None]]:
    """A callback (done, total, what) drawn as a bar on a terminal's stderr, as plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda done, total, what: None
    elif not console.is_terminal:
        yield _plain_lines()
    else:
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what[-40:]
            )


def _plain_lines() -> Callable[[float, float, str], None]:
    """A line where a step begins, and one every two seconds: alive, and not a flood in a log."""
    from time import monotonic

    began = last = monotonic()
    step = ""

    def show(done: float, total: float, what: str) -> None:
        nonlocal began, last, step
        now = monotonic()
        begins = not done and what != step
        if not done:
            began, step = now, what
        if not begins and now - last < 2:
            return
        last = now
        left = f", about {_seconds((now - began) * (total - done) / done)} left" if done else ""
        typer.echo(f"{done / total:4.0%}  {what}{left}" if total else what, err=True)

    return show


def _seconds(seconds: float) -> str:
    """ "50 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show(pieces: Iterable[Any], *, json_output: bool) -> Any:
    """Print an answer as it comes, or in the end as one JSON object with its Statistics; returns those.

    pieces: of `decode.generate.stream`, whose last is the Statistics.
    """
    shown = harmless if sys.stdout.isatty() else str
    texts, statistics = [], None
    try:
        for piece in pieces:
            if not isinstance(piece, str):
                statistics = piece
            elif json_output:
                texts.append(piece)
            else:
                sys.stdout.write(shown(piece))
                sys.stdout.flush()
    except (SpqtError, Terminated):  # of Ctrl-C it is said where it ends the answer, or the command
        if sys.stdout.isatty() and not json_output:
            end_line()
        raise
    assert statistics is not None
    if json_output:
        typer.echo(as_json({"text": "".join(texts), **dataclasses.asdict(statistics)}))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return statistics


def say_written(path: Path, silent: bool = False) -> None:
    """Name a file that was written beside what is printed; "-" is the terminal."""
    if not silent and str(path) != "-":
        typer.echo(harmless(f"wrote {path}"), err=True)


def end_line() -> None:
    """Begin a new line on the terminal, where there is one: what is said next does not follow half a line."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            stream.write("\n")
            stream.flush()
            return


def as_json(value: Any) -> str:
    """A result (dataclass, Path and all) as one line of JSON; NaN and infinity, which JSON lacks, as null."""
    return json.dumps(_finite(value), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
