"""`spqt list`: its flags."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spqt_cli.cli.flags import Json
from spqt_cli.cli.output import as_json
from spqt_cli.system.terminal import harmless

if TYPE_CHECKING:
    from spqt_cli.format.inventory import Found

NONE = "no converted models here; make one: spqt convert org/name -o my-model"


def list_models(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER", help="Where to look instead of here and in the hub's cache.", readable=False
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """List converted models: here and in the hub's cache, or in the folders that are named."""
    from spqt_cli.format import inventory

    found = inventory.find(folders) if folders else inventory.find([Path()]) + inventory.in_hub_cache()
    if json_output:
        typer.echo(as_json(found))
    elif found:
        typer.echo(harmless(table(found)))
    else:
        typer.echo(NONE, err=True)


def table(found: "list[Found]") -> str:
    """A line for each model. MB: of its weights on disk. KL: what skipping costs, nats per token."""
    width = max(len("model"), *(len(one.name) for one in found))
    lines = [f"{'model':<{width}}{'MB':>9}{'bits':>6}{'skips':>7}{'KL':>7}  fitted"]
    for one in found:
        if one.fault:
            lines.append(f"{one.name:<{width}}  damaged: {one.fault}")
            continue
        skips = "-" if one.sparsity is None else f"{one.sparsity:.0%}"
        kl = "-" if one.kl is None else f"{one.kl:.3f}"
        size = (one.size_bytes or 0) / 1e6
        lines.append(f"{one.name:<{width}}{size:9.1f}{one.bits:6}{skips:>7}{kl:>7}  {one.fitted or '-'}")
    lines.append(
        "skips: calibrated sparsity, -: not calibrated; KL: of that to the dense run, nats per token"
    )
    return "\n".join(lines)
