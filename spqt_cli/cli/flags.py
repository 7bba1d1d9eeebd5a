"""Which converted model a command runs: named as an argument or, as mlx-lm has it, by --model."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.errors import UsageError

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A converted folder or hub id.", show_default=False)
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model, as an option.")]


def optional(argument: str | None, option: str | None, usage: str) -> str | None:
    """The model that was named, None if none was. Raises UsageError for two. usage: a hint, the command."""
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"two models are named: {argument} and --model {option}", usage)
    return argument if argument is not None else option


def needed(argument: str | None, option: str | None, usage: str) -> str:
    """The model that was named. Raises UsageError unless it is exactly one."""
    model = optional(argument, option, usage)
    if model is None:
        raise UsageError("no model is named", usage)
    return model


def with_text(first: str | None, second: Path | None, option: str | None, usage: str) -> tuple[str, Path]:
    """The model and the text that a command's two arguments name; with --model, a lone one is the text."""
    if first is not None and second is None and option is not None:
        return option, Path(first)
    if second is None:
        there = f", and there is only {first}" if first is not None else ""
        raise UsageError(f"a model and a text are needed{there}", usage)
    return needed(first, option, usage), second
