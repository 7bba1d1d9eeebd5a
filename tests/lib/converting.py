"""Helpers for the tests that convert tiny checkpoints."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.convert import convert
from spqt_cli.convert.convert import ConvertOptions

OPTIONS = ConvertOptions(group_size=32)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(source: Path, output: Path, options: ConvertOptions = OPTIONS) -> dict[str, bytes]:
    convert.convert(str(source), output, options)
    return contents(output)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def change(folder: Path, name: str, array: mx.array) -> None:
    """Replace one tensor of a checkpoint."""
    shard = str(folder / "model.safetensors")
    mx.save_safetensors(shard, mx.load(shard) | {name: array})


def config_of(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def run_path(source: Path, output: Path) -> Path:
    run(source, output)
    return output


class Stop(Exception):
    """Stands for whatever ends a run."""


def interrupted(source: Path, output: Path, after: int, options: ConvertOptions = OPTIONS) -> None:
    """Convert, but stop after that many tensors."""
    seen = []

    def stop(done: float, total: float, name: str) -> None:
        seen.append(name)
        if len(seen) == after:
            raise Stop

    with pytest.raises(Stop):
        convert.convert(str(source), output, options, stop)
