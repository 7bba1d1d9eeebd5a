"""`spqt inspect`: its flags."""

from typing import Annotated

import typer

from spqt_cli.cli.flags import Json, Revision, models
from spqt_cli.cli.output import as_json
from spqt_cli.system.terminal import harmless


def inspect(
    model: Annotated[str, typer.Argument(help="A converted folder or hub id.", autocompletion=models)],
    revision: Revision = None,
    json_output: Json = False,
) -> None:
    """Show what a converted folder holds, from its headers alone."""
    from spqt_cli.cli import describe

    summary = describe.describe(model, revision)
    typer.echo(as_json(summary) if json_output else harmless(summary.text()))
