"""Safetensors shards written at known offsets, so that no shard is ever held in memory.

Sizes are known from the plan, hence also every header and offset: a tensor is written the moment it
is ready, in any order, and a run that stopped goes on in the same file.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from spqt_cli.convert.plan import Part, Unit
from spqt_cli.format import checkpoint_files
from spqt_cli.format.config_json import INDEX
from spqt_cli.system import files

LARGEST_SHARD = 5 << 30  # bytes, as mlx-lm's own shards
WIDTHS = checkpoint_files.FLOATING | checkpoint_files.INTEGER


@dataclass
class Shard:
    """One file of the output. offsets: tensor -> its first byte in the file. nbytes: the whole file."""

    name: str
    parts: list[Part]
    offsets: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


def lay_out(units: list[Unit], metadata: dict[str, str], largest: int) -> list[Shard]:
    """The shards for units, filled in order; all parts of a unit share a shard.

    largest: bytes of a shard. metadata: of every shard. Its values may change later, their lengths may not.
    """
    groups: list[list[Part]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.written_bytes > largest:
            groups.append([])
            size = 0
        groups[-1].extend(unit.parts)
        size += unit.written_bytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [_place(Shard(name, parts), metadata) for name, parts in zip(names, groups, strict=True)]


def _place(shard: Shard, metadata: dict[str, str]) -> Shard:
    # Wide dtypes first, as safetensors' own writer orders them: every tensor is aligned to its width.
    shard.parts.sort(key=lambda part: (-WIDTHS[part.dtype], part.name))
    start = len(header(shard, metadata))
    for part in shard.parts:
        shard.offsets[part.name] = start
        start += part.nbytes
    shard.nbytes = start
    return shard


def header(shard: Shard, metadata: dict[str, str]) -> bytes:
    """The bytes in front of a shard's data: eight of length, then JSON padded to a multiple of eight."""
    entries: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for part in shard.parts:
        entries[part.name] = {
            "dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, start + part.nbytes],
        }  # fmt: skip
        start += part.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Writer:
    """The open shards of one output; every method may raise ResourceError."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder, self.shards = folder, shards
        self._files: dict[str, int] = {}
        self._homes = {part.name: shard for shard in shards for part in shard.parts}

    def __enter__(self) -> Self:
        for shard in self.shards:
            path = self.folder / shard.name
            with files.disk_errors(path):
                self._files[shard.name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                os.ftruncate(self._files[shard.name], shard.nbytes)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of the tensor `name`, `offset` bytes into it."""
        shard = self._homes[name]
        files.write_at(self._files[shard.name], shard.offsets[name] + offset, data, self.folder / shard.name)

    def read(self, part: Part, step: int = 1 << 20) -> Iterator[bytes]:
        """The written bytes of a tensor, in pieces of at most `step` bytes."""
        shard = self._homes[part.name]
        start = shard.offsets[part.name]
        file = self._files[shard.name]
        for done in range(0, part.nbytes, step):
            yield os.pread(file, min(step, part.nbytes - done), start + done)

    def write_headers(self, metadata: dict[str, str]) -> None:
        """Write every shard's header, with its final metadata."""
        for shard in self.shards:
            path = self.folder / shard.name
            files.write_at(self._files[shard.name], 0, memoryview(header(shard, metadata)), path)


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Write the index that names each tensor's shard."""
    weight_map = {part.name: shard.name for shard in shards for part in shard.parts}
    total = sum(part.nbytes for shard in shards for part in shard.parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files.write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
