"""What `calibrate` and `convert --calibrate` ask for and print."""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from spqt_cli.calibrate.calibrate import CalibrateOptions, Calibration
    from spqt_cli.cli.presets import Preset


def options(wishes: "Preset", **others: Any) -> "CalibrateOptions":
    """The options of a calibration: a preset's settings, and others of CalibrateOptions."""
    from spqt_cli.calibrate.calibrate import CalibrateOptions

    chosen: dict[str, Any] = {"sparsity": wishes.sparsity, "tokens": wishes.tokens, "method": wishes.method}
    known = {key: value for key, value in chosen.items() if value is not None}
    return dataclasses.replace(CalibrateOptions(**others), **known)


def estimate(silent: bool) -> Callable[[float], None]:
    """A callback that says how many seconds the work will take."""

    def say(seconds: float) -> None:
        from spqt_cli.measure import duration

        expected = duration.words(seconds)
        typer.echo(
            f"calibrating takes {expected} here; an interrupted run goes on where it stopped", err=True
        )

    return (lambda _: None) if silent else say


def report(result: "Calibration", model: Path, *, quiet: bool, json_output: bool) -> None:
    """Print the table, what is to be noted, what the KL means, and what comes next."""
    from spqt_cli.calibrate import calibrate as calibrator
    from spqt_cli.decode import quality_warning

    told = not (quiet or json_output)
    if told:
        calibrator.print_table(result, sys.stdout)
    elif result.note:
        typer.echo(f"note: {result.note}", err=True)
    if result.warning:
        typer.echo(result.warning, err=True)
    kl = result.tried[0].kl
    if told and not result.warning:  # which says it as well
        typer.echo(f"KL to dense {kl:.3f} on held-out text: {quality_warning.judged(kl)}", err=True)
    if told:
        typer.echo(f'next: spqt compare {shlex.quote(str(model))} --prompt "Hello"', err=True)
