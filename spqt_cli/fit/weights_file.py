"""Tensors of a converted folder, overwritten in place: their shapes and dtypes stay.

Until `finish` has written new hashes, the folder does not agree with its config.json.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

import mlx.core as mx

from spqt_cli.convert.encode import raw
from spqt_cli.format import config_json, contract
from spqt_cli.format.folder import METADATA_CONTENT
from spqt_cli.system import files

STEP = 1 << 22  # bytes read at once


def copy_folder(source: Path, target: Path) -> None:
    """Copy a converted folder's files, whole or not at all."""
    partial = target.with_name(f"{target.name}-partial")
    with files.disk_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    files.check_space(partial, sum(path.stat().st_size for path in source.iterdir() if path.is_file()))
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".spqt-"):
            files.copy(path, partial / path.name)
    with files.disk_errors(target):
        os.rename(partial, target)


class WeightsFile:
    """The open shards of a folder, which need not agree with its config.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = config_json.read_config(folder)
        self._files: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, int]] = {}  # tensor -> shard, first byte, bytes
        self._headers: dict[str, int] = {}  # shard -> bytes before its data
        for shard in sorted(self._config["spqt"]["shards"]):
            self._open(shard)

    def _open(self, shard: str) -> None:
        path = self._folder / shard
        with files.disk_errors(path):
            self._files[shard] = handle = os.open(path, os.O_RDWR)
        length = 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
        self._headers[shard] = length
        for name, entry in json.loads(os.pread(handle, length - 8, 8)).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                self._places[name] = (shard, length + first, last - first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._files.values():
            os.close(handle)

    def write(self, name: str, array: mx.array) -> None:
        """Put an array, of the tensor's own dtype and shape, in its place."""
        shard, offset, size = self._places[name]
        data = raw(array)
        if data.nbytes != size:
            raise ValueError(f"{name} has {size} bytes, not {data.nbytes}")
        files.write_at(self._files[shard], offset, data, self._folder / shard)

    def sha256(self, name: str) -> str:
        """The SHA-256 of a tensor's bytes as they are stored."""
        shard, offset, size = self._places[name]
        return self._hash(shard, offset, size)

    def _hash(self, shard: str, offset: int, size: int) -> str:
        found = hashlib.sha256()
        for done in range(0, size, STEP):
            found.update(os.pread(self._files[shard], min(STEP, size - done), offset + done))
        return found.hexdigest()

    def finish(self, key: str, said: dict[str, Any]) -> None:
        """Write new hashes into every shard and into config.json, and under `key` what is `said` of the work.

        Thresholds are of the old weights: they go.
        """
        config = contract.without_thresholds(self._config)
        section = config["spqt"]
        sizes = {shard: os.fstat(handle).st_size for shard, handle in self._files.items()}
        data = [
            self._hash(shard, start, sizes[shard] - start) for shard, start in sorted(self._headers.items())
        ]
        content = hashlib.sha256("".join(data).encode()).hexdigest()
        for shard, length in self._headers.items():
            header = os.pread(self._files[shard], length, 0)
            old = json.loads(header[8:])["__metadata__"][METADATA_CONTENT]
            header = header.replace(old.encode(), content.encode(), 1)
            files.write_at(self._files[shard], 0, memoryview(header), self._folder / shard)
        section["content"] = content
        section[key] = said
        section["shards"] = {shard: files.sha256(self._folder / shard) for shard in self._files}
        with files.disk_errors(self._folder):
            config_json.write_config(self._folder, config)
