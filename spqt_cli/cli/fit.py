"""`spqt fit`: its flags."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli.flags import FitData, FitSeed, Json, OwnText, Quiet, TrainSteps, values
from spqt_cli.cli.output import as_json, progress
from spqt_cli.system.terminal import harmless


def fit(
    model: Annotated[Path, typer.Argument(help="A converted folder.", readable=False)],
    source: Annotated[str, typer.Argument(help="What it was converted from: folder, hub id or .gguf file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; it must not exist.", readable=False),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="gptq; full: trains scales and norms as well.", autocompletion=values("gptq", "full")
        ),
    ] = "gptq",
    own_text: OwnText = None,
    train_steps: TrainSteps = None,
    data: FitData = None,
    seed: FitSeed = 0,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Fit a converted model's weights to its source, so that rounding and skipping cost less."""
    from spqt_cli.fit import fit as fitter
    from spqt_cli.fit.options import FitOptions

    target = output or model.with_name(f"{model.resolve().name}-fitted")
    options = FitOptions(method=method, own=own_text, steps=train_steps, data=data, seed=seed)
    with progress(quiet or json_output) as on_progress:
        result = fitter.fit(model, source, target, options, on_progress)
    if json_output:
        typer.echo(as_json(result))
    else:
        typer.echo(harmless(result.summary()))
        if not quiet:
            typer.echo(f"next: spqt calibrate {shlex.quote(str(target))}", err=True)
