"""`spqt verify`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli.flags import Json
from spqt_cli.cli.output import as_json


def verify(
    model: Annotated[Path, typer.Argument(help="A converted folder.", readable=False)],
    json_output: Json = False,
) -> None:
    """Read every byte of a converted folder and compare it with the recorded hashes."""
    from spqt_cli.format.folder import Folder

    shards = Folder(model).verify()
    typer.echo(as_json({"shards": shards}) if json_output else f"{model}: {len(shards)} shard(s) intact")
