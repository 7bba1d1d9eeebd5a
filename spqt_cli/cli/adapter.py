"""`spqt adapter`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli.flags import Json, Output
from spqt_cli.cli.output import as_json
from spqt_cli.system.terminal import harmless


def adapter(
    source: Annotated[Path, typer.Argument(help="The folder of a PEFT adapter.", readable=False)],
    output: Output,
    json_output: Json = False,
) -> None:
    """Convert a LoRA or DoRA adapter of Hugging Face's PEFT for --adapter-path."""
    from spqt_cli.adapt import peft

    result = peft.convert(source, output)
    typer.echo(as_json(result) if json_output else harmless(result.summary()))
