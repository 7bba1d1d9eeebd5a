"""`spqt fuse`: its flags."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli.flags import Json, Output, Quiet
from spqt_cli.cli.output import as_json
from spqt_cli.system.terminal import harmless


def fuse(
    model: Annotated[str, typer.Argument(help="A converted folder or hub id.")],
    adapter: Annotated[
        Path, typer.Argument(help="A folder of LoRA or DoRA adapters, as mlx-lm writes it.", readable=False)
    ],
    output: Output,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Write a converted model with an adapter in its weights, rounded again; without thresholds."""
    from spqt_cli.adapt import fuse as fuser

    result = fuser.fuse(model, adapter, output)
    if json_output:
        typer.echo(as_json(result))
    else:
        typer.echo(harmless(result.summary()))
        if not quiet:
            typer.echo(f"next: spqt calibrate {shlex.quote(str(output))}", err=True)
