"""The work of `convert`: converting, or converting and calibrating in one go, and what is printed of it."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from spqt_cli.cli import calibrating
from spqt_cli.cli.output import as_json, progress
from spqt_cli.system.terminal import harmless

if TYPE_CHECKING:
    from spqt_cli.cli.presets import Preset
    from spqt_cli.convert.convert import ConvertOptions
    from spqt_cli.fit.options import FitOptions

OnProgress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Job:
    """A source to convert. output: None for a folder named after it. fit: None rounds weights one by one."""

    source: str
    output: Path | None
    options: "ConvertOptions"
    fit: "FitOptions | None"

    @cached_property
    def target(self) -> Path:
        """The folder to write."""
        from spqt_cli.convert import convert

        return self.output or convert.default_output(self.source, self.options)

    def run(self, target: Path, on_progress: OnProgress) -> Any:
        """Write `target`; a ConvertResult or FitResult."""
        from spqt_cli.convert import convert

        if self.fit is None:
            return convert.convert(self.source, target, self.options, on_progress)
        from spqt_cli.fit import fit

        return fit.convert_fitted(self.source, target, self.options, self.fit, on_progress)


def rehearsed(job: Job, wishes: "Preset | None", *, json_output: bool) -> None:
    """Print what would be done. wishes: a preset's, for the calibration; None without one."""
    from spqt_cli.cli import dry_run
    from spqt_cli.convert import convert as converter

    found = converter.rehearse(job.source, job.target, job.options)
    options = None if wishes is None else calibrating.options(wishes)
    result = dry_run.with_steps(found, job.fit, options)
    typer.echo(as_json(result) if json_output else harmless(result.summary()))


def alone(job: Job, *, quiet: bool, json_output: bool) -> None:
    """Convert, and print what was done."""
    with progress(quiet or json_output) as on_progress:
        result = job.run(job.target, on_progress)
    if json_output:
        typer.echo(as_json(result))
        return
    typer.echo(harmless(result.summary()))
    if not quiet:
        typer.echo(f"next: spqt calibrate {shlex.quote(str(job.target))}", err=True)


def and_calibrate(job: Job, wishes: "Preset", *, quiet: bool, json_output: bool) -> None:
    """Convert and calibrate, and print what was done. wishes: a preset's, for the calibration."""
    from spqt_cli.calibrate import at_once
    from spqt_cli.convert import convert as converter
    from spqt_cli.system import files

    converter.check_options(job.options)
    output, silent = files.expanded(job.target).absolute(), quiet or json_output
    files.check_target(output, files.expanded(job.source))

    def convert(folder: Path) -> Any:
        result = job.run(folder, on_progress)
        for one in filter(None, (result, getattr(result, "conversion", None))):
            one.output = output
        if not json_output:
            typer.echo(harmless(result.summary()))
        return result

    with progress(silent) as on_progress:
        converted, found = at_once.run(
            output,
            at_once.name_of(job.source, job.options, job.fit),
            convert,
            calibrating.options(wishes),
            on_progress,
            calibrating.estimate(silent),
        )
    if json_output:
        typer.echo(as_json({"conversion": converted, "calibration": found}))
    calibrating.report(found, job.target, quiet=quiet, json_output=json_output)
