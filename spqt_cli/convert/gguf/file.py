"""The header of a .gguf file: its metadata and where each tensor lies, all of it checked.

Owns the walk over the header. Every count and offset is compared with the file's size before it is
used, so a hostile file ends in one SpqtError. Knows nothing of models or tokenizers.

The value types, tensor types and block sizes are the `gguf` package's. Its GGUFReader is not used:
it maps the whole file, trusts the counts and makes NumPy views for each element of an array, which for
a vocabulary of 262,144 tokens takes seconds and hundreds of megabytes.
"""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_HEADER = 256 << 20  # bytes; a vocabulary of 262,144 tokens with merges takes 20 MB
MOST_ELEMENTS = 1 << 22  # of all arrays together; the largest known vocabularies need 1.1 million
MOST_KEYS = 1 << 16
MOST_TENSORS = 1 << 20
MOST_DIMENSIONS = 4
MOST_WEIGHTS = 1 << 48  # elements of one tensor, far above any model and far below overflow
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
ORIGINAL = "convert the HF original"

# struct codes by gguf.GGUFValueType; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the header declares it.

    path: the file it is in. shape: outermost first, as in an HF checkpoint. kind: a
    gguf.GGMLQuantizationType. start: bytes from the beginning of the file. row_bytes: size of one row of
    shape[-1] weights.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: Any
    start: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.row_bytes * prod(self.shape[:-1])


@dataclass(frozen=True)
class Header:
    """Metadata (scalars, strings, lists of strings, NumPy arrays of numbers) and tensors by name.

    parts: the files of a split one, in order; empty for a whole one.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    parts: tuple[Path, ...] = ()


def read_header(path: Path) -> Header:
    """The checked header of a .gguf file."""
    try:
        with path.open("rb") as file:
            return _Walk(path, file).header()
    except OSError as error:
        raise SpqtError(f"{path} can't be read: {error.strerror}", "check its permissions") from None


class _Walk:
    """Reads a header from front to back; never past the end of the file nor past LONGEST_HEADER."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.elements = 0

    def header(self) -> Header:
        self._magic()
        tensors, keys = self.number("Q"), self.number("Q")
        self._limit(tensors, MOST_TENSORS, "tensors")
        self._limit(keys, MOST_KEYS, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text("a metadata key")
            if key in metadata:
                raise self.damaged(f"metadata key {key!r} stands twice")
            metadata[key] = self._value(self.number("I"), key)
        declared = [self._tensor() for _ in range(tensors)]
        return Header(self.path, metadata, self._place(declared, metadata))

    def damaged(self, what: str) -> SpqtError:
        return SpqtError(f"{self.path} is damaged: {what}", AGAIN)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.size - self.position:
            raise self.damaged(f"its header ends early, at byte {self.size}")
        if count > LONGEST_HEADER - self.position:
            raise self.damaged(f"its header is longer than {LONGEST_HEADER >> 20} MB")
        data = self.file.read(count)
        if len(data) != count:
            raise self.damaged("it changed while it was being read")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        """The next number, little-endian."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, what: str) -> str:
        """The next string."""
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def _limit(self, found: int, most: int, what: str) -> None:
        if found > most:
            raise self.damaged(f"it declares {found} {what}, more than {most}")

    def _magic(self) -> None:
        if self.size < len(MAGIC) or self.take(len(MAGIC)) != MAGIC:
            raise SpqtError(f"{self.path} is not a GGUF file", AGAIN)
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError(f"{self.path} is a big-endian GGUF file", "use the little-endian file")
        if version not in VERSIONS:
            raise UnsupportedError(
                f"{self.path} is GGUF version {version}; spqt reads 2 and 3", "use a current converter's file"
            )

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(key)
        if kind == ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise self.damaged(f"{key} has the unknown value type {kind}")
        return self.number(SCALARS[kind])

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind, count = self.number("I"), self.number("Q")
        self.elements += count
        self._limit(self.elements, MOST_ELEMENTS, f"array elements up to {key}")
        if kind == STRING:
            return [self.text(f"an entry of {key}") for _ in range(count)]
        if kind not in SCALARS:
            raise self.damaged(f"{key} is an array of the unknown or nested type {kind}")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text("a tensor's name")
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))))
        if 0 in shape or prod(shape) > MOST_WEIGHTS:
            raise self.damaged(f"tensor {name} has the shape {shape}")
        return name, shape, self.number("I"), self.number("Q")

    def _place(
        self, declared: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> dict[str, StoredTensor]:
        """The tensors with their places in the file: inside it, aligned, and none over another."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        base = -(-self.position // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in declared:
            if name in tensors:
                raise self.damaged(f"tensor {name} stands twice")
            if offset % alignment:
                raise self.damaged(f"tensor {name} lies at {offset}, no multiple of {alignment}")
            tensors[name] = self._stored(name, shape, kind, base + offset)
        end = base
        for tensor in sorted(tensors.values(), key=lambda t: t.start):
            if tensor.start < end:
                raise self.damaged(f"tensor {tensor.name} lies over another")
            end = tensor.start + tensor.nbytes
            if end > self.size:
                raise self.damaged(f"tensor {tensor.name} ends at byte {end} of {self.size}")
        return tensors

    def _stored(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedError(
                f"{self.path}: tensor {name} has the unknown type {kind}",
                "use a file of another quantization",
            ) from None
        weights, size = GGML_QUANT_SIZES[known]
        if shape[-1] % weights:
            raise self.damaged(f"tensor {name} has rows of {shape[-1]}, no multiple of {weights}")
        return StoredTensor(self.path, name, shape, known, start, shape[-1] // weights * size)
