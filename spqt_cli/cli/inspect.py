"""`spqt inspect`: its flags."""

from typing import Annotated

import typer

from spqt_cli.cli.flags import Json, Plot, Revision, models
from spqt_cli.cli.output import as_json
from spqt_cli.errors import UsageError
from spqt_cli.system import picture
from spqt_cli.system.terminal import harmless


def inspect(
    model: Annotated[str, typer.Argument(help="A converted folder or hub id.", autocompletion=models)],
    revision: Revision = None,
    plot: Plot = None,
    layer: Annotated[
        str | None, typer.Option(help="With --plot: whose inputs to draw. [the layer that skips most]")
    ] = None,
    json_output: Json = False,
) -> None:
    """Show what a converted folder holds, from its headers alone."""
    from spqt_cli.cli import describe
    from spqt_cli.format import locate

    if plot is not None:
        picture.check(plot, json_output)
    elif layer is not None:
        raise UsageError("--layer says what --plot draws", "add --plot FILE.png")
    summary = describe.describe(model, revision)
    drawn = None
    if plot is not None:
        from spqt_cli.cli import pictures

        drawn = pictures.of_folder(locate.open_folder(model, revision), layer)
    typer.echo(as_json(summary) if json_output else harmless(summary.text()))
    if plot is not None and drawn is not None:
        picture.save(drawn, plot)
