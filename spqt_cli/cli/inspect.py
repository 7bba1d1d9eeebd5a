"""`spqt inspect`: its flags."""

from typing import Annotated

import typer

from spqt_cli.cli.flags import Json, Plot, Revision, models
from spqt_cli.cli.output import as_json, say_written
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
    plan: Annotated[
        int | None, typer.Option(help="Calculate what so many devices would hold, read and reach.")
    ] = None,
    bandwidth: Annotated[
        str, typer.Option(help="With --plan: memory of one device, GB/s, or an Apple chip: 'M4 Max'.")
    ] = "M4 Max",
    link: Annotated[float, typer.Option(help="With --plan: GB/s from one device to the next.")] = 5.0,
    latency: Annotated[float, typer.Option(help="With --plan: microseconds of a short message.")] = 50.0,
    json_output: Json = False,
) -> None:
    """Show what a converted folder holds, from its headers alone."""
    from spqt_cli.cli import describe
    from spqt_cli.format import locate

    if plot is not None:
        picture.check(plot, json_output)
    elif layer is not None:
        raise UsageError("--layer says what --plot draws", "add --plot FILE.png")
    if plan is not None:
        from spqt_cli.cli import device_plan

        devices = device_plan.Devices(plan, device_plan.bandwidth(bandwidth), link, latency)
        found = device_plan.plan(model, revision, devices)
        typer.echo(as_json(found.document()) if json_output else harmless(found.text()))
        return
    summary = describe.describe(model, revision)
    drawn = None
    if plot is not None:
        from spqt_cli.cli import pictures

        drawn = pictures.of_folder(locate.open_folder(model, revision), layer)
    typer.echo(as_json(summary) if json_output else harmless(summary.text()))
    if plot is not None and drawn is not None:
        picture.save(drawn, plot)
        say_written(plot, json_output)
