"""Arrays of a running fit, on disk by name: hidden states between blocks, inputs of layers.

They are as large as the text, not the model, and would take the memory that a block needs. A GPU with memory
of its own may hold some: the way to disk and back took most of a block's time there.
"""

from fnmatch import fnmatchcase
from pathlib import Path

import mlx.core as mx
import numpy as np

from spqt_cli.fit.products import Values
from spqt_cli.measure import many_rows
from spqt_cli.system import files

LARGEST_HALF = 6e4  # float16 ends at 65504
HELD = 8  # of a GPU's memory, one part of so many is for a Store


def room() -> int:
    """Bytes that the default device may hold of a Store: none where it shares its memory with the host."""
    if many_rows.on_cpu() or not mx.cuda.is_available():
        return 0
    return int(mx.device_info().get("total_memory", 0)) // HELD


def _fits_half(array: mx.array) -> bool:
    if not many_rows.on_cpu():
        return bool((mx.abs(array).max() < LARGEST_HALF).item())
    values = np.array(array, copy=False)  # numpy looks through an array much faster than MLX's CPU build
    return bool(max(values.max(initial=0), -values.min(initial=0)) < LARGEST_HALF)


class Store:
    """Arrays in a folder. Names have no slashes."""

    def __init__(self, folder: Path, room: int = 0) -> None:
        """room: bytes of arrays that a GPU holds; those saved as `short` are then on no disk: a run that was
        stopped never asks for them.
        """
        self._folder, self._room = folder, room
        self._held: dict[str, mx.array] = {}
        with files.disk_errors(folder):
            folder.mkdir(exist_ok=True)

    def save(self, name: str, array: mx.array, *, short: bool = False) -> None:
        """Keep an array of any floating type as float32; with `short` as float16 where its values fit."""
        array = array.astype(mx.float32)
        if short and _fits_half(array):
            array = array.astype(mx.float16)
        if not many_rows.on_cpu() and self._hold(name, array) and short:
            return
        values = np.array(array, copy=False)
        with files.disk_errors(self._folder), self._path(name).open("wb") as file:
            np.save(file, values, allow_pickle=False)

    def _hold(self, name: str, array: mx.array) -> bool:
        """Keep an array in the GPU's memory, if there is room."""
        self._release(name)
        if array.nbytes > self._room:
            return False
        mx.eval(array)
        self._held[name] = array
        self._room -= array.nbytes
        return True

    def _release(self, name: str) -> None:
        if (array := self._held.pop(name, None)) is not None:
            self._room += array.nbytes

    def load(self, name: str) -> mx.array:
        """The array as float32. Raises OSError or ValueError where it is missing or torn."""
        values = self.rows(name)
        return values if isinstance(values, mx.array) else mx.array(values)

    def rows(self, name: str) -> Values:
        """The same as products take it: on the CPU of numpy, which a copy is spared."""
        if name in self._held:
            return self._held[name].astype(mx.float32)
        values = np.load(self._path(name), allow_pickle=False)
        if many_rows.on_cpu():
            return values.astype(np.float32, copy=False)
        return mx.array(values).astype(mx.float32)

    def has(self, name: str) -> bool:
        """True where the array is there, whole."""
        if name in self._held:
            return True
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
        for name in [one for one in self._held if fnmatchcase(one, pattern)]:
            self._release(name)
        for path in self._folder.glob(f"{pattern}.npy"):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"
