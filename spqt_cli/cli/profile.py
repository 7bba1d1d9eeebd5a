"""`spqt profile`: what spqt remembers of this machine."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli.flags import Json
from spqt_cli.cli.output import as_json

# What lies in the cache folder, by name; nothing else in it is shown or deleted.
MEANINGS = {
    "profile-*.json": "how each layer runs fastest on a device; from spqt bench --kernel --write",
    "kernels.json": "GPU kernels that agreed with their definition",
    "many-rows.json": "how prompts and batches multiply fastest on a GPU",
    "tiles.json": "which tiles of outputs multiply one row fastest on an Apple GPU",
    "verified/*": "a model from the hub whose hashes were checked",
}


class Action(enum.StrEnum):
    """What `spqt profile` can do."""

    show = "show"
    clear = "clear"


@dataclass(frozen=True)
class Remembered:
    """A file of the cache folder. current: a profile that this device and version would use."""

    path: Path
    size_bytes: int
    meaning: str
    current: bool = False


def profile(
    action: Annotated[Action, typer.Argument(help="show, or clear: delete it all.")] = Action.show,
    json_output: Json = False,
) -> None:
    """Show or clear what spqt remembers of this machine: speeds of its layers, checked kernels."""
    found = remembered()
    if action is Action.clear:
        from spqt_cli.system import files

        for one in found:
            with files.disk_errors(one.path):
                one.path.unlink(missing_ok=True)
    if json_output:
        typer.echo(as_json({"action": action.value, "folder": _folder(), "files": found}))
    elif action is Action.clear:
        typer.echo(f"{len(found)} files deleted from {_folder()}")
    else:
        typer.echo("\n".join([f"{_folder()}: {len(found)} files", *map(_line, found)]))


def remembered() -> list[Remembered]:
    """The files that spqt keeps, in the order of MEANINGS."""
    own = _own_profile()
    return [
        Remembered(path, path.stat().st_size, meaning, path == own)
        for pattern, meaning in MEANINGS.items()
        for path in sorted(_folder().glob(pattern))
        if path.is_file()
    ]


def _line(one: Remembered) -> str:
    used = " (this device's)" if one.current else ""
    return f"  {one.path.relative_to(_folder())}{used}, {one.size_bytes / 1e3:.1f} kB: {one.meaning}"


def _folder() -> Path:
    from spqt_cli.system import files

    return files.cache_folder()


def _own_profile() -> Path | None:
    """Where this device's profile would lie; None without any, since to know it takes MLX."""
    if not any(_folder().glob("profile-*.json")):
        return None
    from spqt_cli.decode import profile as profiles

    return profiles.path()
