"""The weights of one stored tensor: dequantized a few rows at a time, and their largest magnitude.

Owns reading and unpacking through `gguf.quants`; knows nothing of names or models. The file is read,
not mapped, so that a process's memory does not grow with the part of the file it has seen.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from spqt_cli.convert.gguf.file import StoredTensor
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

CHUNK_WEIGHTS = 1 << 20  # weights unpacked at once: 4 MB of float32
LARGEST_HALF = 65504.0

# Where the float16 fields of a block stand, and the largest factor that meets each of them: the sum of
# |field| * factor bounds every weight of the block. Types not listed are unpacked instead.
BOUNDS: dict[str, tuple[tuple[int, int], ...]] = {
    "Q4_0": ((0, 8),),
    "Q4_1": ((0, 15), (2, 1)),
    "Q5_0": ((0, 16),),
    "Q5_1": ((0, 31), (2, 1)),
    "Q8_0": ((0, 128),),
    "Q2_K": ((80, 15 * 3), (82, 15)),
    "Q3_K": ((108, 32 * 4),),
    "Q4_K": ((0, 63 * 15), (2, 63)),
    "Q5_K": ((0, 63 * 31), (2, 63)),
    "Q6_K": ((208, 128 * 32),),
    "IQ4_NL": ((0, 127),),
    "IQ4_XS": ((0, 32 * 127),),
}


def check_type(tensor: StoredTensor) -> None:
    """Refuse a tensor type that gguf.quants can't unpack."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.kind][1]), np.uint8), tensor.kind)
    except NotImplementedError:
        raise UnsupportedError(
            f"{tensor.path}: tensor {tensor.name} has the type {tensor.kind.name}, which can't be unpacked",
            "use a file of another quantization",
        ) from None


def rows(tensor: StoredTensor) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of a tensor: number of the first row, and float32 [rows, shape[-1]]."""
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # a NaN or Inf in the file is the caller's to judge
        for first, packed in _packed(tensor):
            yield first, dequantize(packed, tensor.kind)


def exceeds_half(tensor: StoredTensor) -> bool:
    """True if a finite weight of the tensor is beyond float16's range."""
    if tensor.kind.name == "F16":
        return False
    fields = BOUNDS.get(tensor.kind.name)
    if fields is not None and _bound(tensor, fields) <= LARGEST_HALF:
        return False
    for _, values in rows(tensor):
        size = np.abs(values)
        if np.any((size > LARGEST_HALF) & np.isfinite(size)):
            return True
    return False


def _bound(tensor: StoredTensor, fields: tuple[tuple[int, int], ...]) -> float:
    """No smaller than any weight's magnitude; Inf if the file holds NaN or Inf."""
    from gguf import GGML_QUANT_SIZES

    size = GGML_QUANT_SIZES[tensor.kind][1]
    pieces = _packed(tensor)
    return max(float(block_bounds(packed.reshape(-1, size), fields).max()) for _, packed in pieces)


def block_bounds(blocks: np.ndarray, fields: tuple[tuple[int, int], ...]) -> np.ndarray:
    """For each packed block a bound of its weights' magnitude: uint8 [n, bytes] -> float32 [n]."""
    bound = np.zeros(len(blocks), np.float32)
    for start, factor in fields:
        field = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)[:, 0]
        with np.errstate(invalid="ignore"):
            bound += np.abs(field.astype(np.float32)) * factor
    return np.where(np.isnan(bound), np.float32(np.inf), bound)


def _packed(tensor: StoredTensor) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Pieces of a tensor as stored: number of the first row, and uint8 [rows, row_bytes]."""
    count = prod(tensor.shape[:-1])
    step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            for first in range(0, count, step):
                wanted = min(step, count - first)
                data = file.read(wanted * tensor.row_bytes)
                if len(data) != wanted * tensor.row_bytes:
                    raise SpqtError(f"{tensor.path} ends inside tensor {tensor.name}", AGAIN)
                yield first, np.frombuffer(data, np.uint8).reshape(wanted, tensor.row_bytes)
    except OSError as error:
        raise SpqtError(f"{tensor.path} can't be read: {error.strerror}", AGAIN) from None
