"""Arrays of a running fit, on disk by name: hidden states between blocks, inputs of layers.

They are as large as the text, not the model, and would take the memory that a block needs.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

from spqt_cli.system import files

LARGEST_HALF = 6e4  # float16 ends at 65504


class Store:
    """Arrays in a folder. Names have no slashes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with files.disk_errors(folder):
            folder.mkdir(exist_ok=True)

    def save(self, name: str, array: mx.array, *, short: bool = False) -> None:
        """Keep an array of any floating type as float32; with `short` as float16 where its values fit."""
        values = np.array(array.astype(mx.float32), copy=False)
        if short and max(values.max(initial=0), -values.min(initial=0)) < LARGEST_HALF:
            values = values.astype(np.float16)
        with files.disk_errors(self._folder), self._path(name).open("wb") as file:
            np.save(file, values, allow_pickle=False)

    def load(self, name: str) -> mx.array:
        """The array as float32. Raises OSError or ValueError where it is missing or torn."""
        return mx.array(np.load(self._path(name), allow_pickle=False).astype(np.float32, copy=False))

    def has(self, name: str) -> bool:
        """True where the array is there, whole."""
        try:
            np.load(self._path(name), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return True

    def sha256(self, name: str) -> str:
        """The SHA-256 of what is stored of an array."""
        return files.sha256(self._path(name))

    def drop(self, pattern: str) -> None:
        """Remove all arrays whose name fits a glob pattern."""
        for path in self._folder.glob(f"{pattern}.npy"):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"
