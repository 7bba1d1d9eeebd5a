"""A .gguf file read as an HF checkpoint: its configuration, its tensors by HF name, its tokenizer.

Owns the door for convert. A file of an architecture, tensor type, key or tokenizer that spqt does not
know is refused by name before any weight is read. Weights are unpacked one tensor at a time.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.convert.gguf import config as gguf_config
from spqt_cli.convert.gguf import split
from spqt_cli.convert.gguf import tokenizer as gguf_tokenizer
from spqt_cli.convert.gguf import values as gguf_values
from spqt_cli.convert.gguf.file import Header
from spqt_cli.convert.gguf.names import ROPE_FACTORS, Origin, origins
from spqt_cli.errors import AGAIN, SpqtError

MOST_FREQUENCIES = 1 << 16  # of a rotary embedding


@dataclass(frozen=True)
class GgufCheckpoint:
    """An open .gguf file.

    config: a complete config.json. dtype: what the weights should be stored in, "float16" or
    "bfloat16". nbytes_source: bytes of the file's tensors.
    """

    path: Path
    config: dict[str, Any]
    dtype: str
    header: Header
    origins: dict[str, Origin]

    @property
    def nbytes_source(self) -> int:
        return sum(tensor.nbytes for tensor in self.header.tensors.values())

    def names(self) -> list[str]:
        """The tensors' HF names, in the order of the layers."""
        return list(self.origins)

    def files(self) -> list[Path]:
        """The file, or all parts of a split one; the first has the metadata."""
        return list(self.header.parts or (self.path,))

    def file_of(self, name: str) -> str:
        """The name of the file that a tensor is in."""
        stored = self.origins[name].stored
        return (self.header.tensors[stored].path if stored else self.path).name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, outputs first."""
        return self.origins[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor: float16, or float32 where the checkpoint's dtype is bfloat16, which NumPy lacks."""
        origin = self.origins[name]
        dtype = np.float16 if self.dtype == "float16" else np.float32
        if origin.stored is None:
            return np.zeros(origin.shape, dtype)
        weights = np.empty((prod(origin.shape[:-1]), origin.shape[-1]), dtype)
        order = _row_order(origin)
        for first, values in gguf_values.rows(self.header.tensors[origin.stored]):
            rows = slice(first, first + len(values))
            target = order[rows] if order is not None and len(origin.shape) > 1 else rows
            with np.errstate(over="ignore"):  # NaN and Inf of the file stay what they are
                weights[target] = values + np.float32(origin.shift) if origin.shift else values
        if order is not None and len(origin.shape) == 1:
            weights[:, order] = weights.copy()
        return weights.reshape(origin.shape)


def open_checkpoint(path: Path) -> GgufCheckpoint:
    """The checkpoint in a .gguf file or the parts of one, with everything checked that can be without
    unpacking it.
    """
    header = split.read(path)
    arch = gguf_config.architecture(header)
    gguf_tokenizer.check(header)
    for tensor in header.tensors.values():
        gguf_values.check_type(tensor)
    config = gguf_config.build(header, arch, _rope_factors(header, arch))
    sources = origins(header, arch, config)
    gguf_tokenizer.check_builds(header, config["vocab_size"])
    dtype = _dtype(header)
    config |= gguf_tokenizer.special_ids(header) | {"torch_dtype": dtype}
    return GgufCheckpoint(header.path, config, dtype, header, sources)


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer's files of a .gguf file into a folder; its config.json should lie there too."""
    header = split.read(path)
    gguf_config.architecture(header)
    gguf_tokenizer.write(header, folder)


def _dtype(header: Header) -> str:
    """bfloat16 if the file stores it or holds weights beyond float16, else float16."""
    tensors = header.tensors.values()
    if any(tensor.kind.name == "BF16" for tensor in tensors):
        return "bfloat16"
    large = any(gguf_values.exceeds_half(tensor) for tensor in tensors)
    return "bfloat16" if large else "float16"


def _rope_factors(header: Header, arch: str) -> np.ndarray | None:
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None or arch != "llama":  # in another architecture it is a tensor without a use
        return None
    if prod(tensor.shape) > MOST_FREQUENCIES:
        raise SpqtError(f"{header.path}: tensor {ROPE_FACTORS} has the shape {tensor.shape}", AGAIN)
    return np.concatenate([values.ravel() for _, values in gguf_values.rows(tensor)])


def _row_order(origin: Origin) -> np.ndarray | None:
    """For each stored row its HF row, where the file interleaves the two rotary halves of each head."""
    if not origin.heads:
        return None
    rows = np.arange(origin.shape[0])
    return rows.reshape(origin.heads, 2, -1).swapaxes(1, 2).ravel()
