"""`spqt presets`: its flags."""

import textwrap
from typing import TYPE_CHECKING

import typer

from spqt_cli.cli.flags import Json
from spqt_cli.cli.output import as_json

if TYPE_CHECKING:
    from spqt_cli.cli.presets import Preset


def list_presets(json_output: Json = False) -> None:
    """List the presets of convert and calibrate, each with what it sets and why."""
    from spqt_cli.cli import presets

    found = {name: presets.meaning(name) for name in presets.names()}
    if json_output:
        settings = {name: vars(presets.load_preset(name)) for name in found}
        typer.echo(as_json([{"name": name, "meaning": found[name], **settings[name]} for name in found]))
        return
    for name, text in found.items():
        lines = [line for part in (text, _settings(presets.load_preset(name))) for line in _wrapped(part)]
        typer.echo("\n".join([name, *lines, ""]))
    typer.echo("use: spqt convert MODEL --preset NAME; calibrate takes one too; or a .toml file")


def _settings(preset: "Preset") -> str:
    plain = {key: value for key, value in vars(preset).items() if isinstance(value, (int, float, str))}
    said = [f"{key.replace('_', ' ')} {value}" for key, value in plain.items()]
    said += [f"{suffix} {bits} bits, group {group}" for suffix, bits, group in preset.projections]
    said += [f"row-grouped {suffix}" for suffix in preset.skip]
    return "sets " + ", ".join(said)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="  ")
