"""One tensor into the bytes that are stored: checked for NaN and Inf, cast, quantized, in pieces.

It knows the plan's units and no files. Nothing larger than a tensor is ever evaluated at once.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from spqt_cli.convert.plan import PLAIN, ROWS, Unit
from spqt_cli.errors import AGAIN, BackendError, ResourceError, SpqtError
from spqt_cli.format import layout

CORNER = 64  # rows or channels of a tensor that are held against what was made of them
NARROW = 2**-7  # what rounding scales and biases to bfloat16 may add, as a part of a weight
CHECKED_AT_ONCE = 1 << 18  # elements per step of the search for NaN and Inf
EXPONENTS = {  # dtype -> integer of its width, all bits but the sign, the exponent's bits
    mx.float16: (mx.uint16, 0x7FFF, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7FFF, 0x7F80),
    mx.float32: (mx.uint32, 0x7FFFFFFF, 0x7F800000),
}


class NotFinite(Exception):
    """A tensor of the source holds NaN or Inf."""


def encode(unit: Unit, array: mx.array) -> Iterator[tuple[int, memoryview]]:
    """Pieces (index of the unit's part, bytes), each part's in the order of its bytes.

    array: the unit's tensor, lazy or not, of the checkpoint's dtype. Raises NotFinite, and SpqtError
    when values do not fit the dtype they are stored in.
    """
    _evaluate(unit, array)
    if not is_finite(array):
        raise NotFinite
    if array.dtype != unit.dtype:
        array = array.astype(unit.dtype)
        _evaluate(unit, array)
        if not is_finite(array):
            raise SpqtError(
                f"tensor {unit.source or unit.name} does not fit {_name(unit)}", "--dtype bfloat16"
            )
    for number, pieces in enumerate(_pieces(unit, array)):
        _evaluate(unit, *pieces)
        if unit.kind != PLAIN and number == 0:
            _check(unit, array, pieces)
        if unit.kind != PLAIN and not all(is_finite(piece) for piece in pieces[1:]):
            raise SpqtError(f"tensor {unit.name}: its scales do not fit {_name(unit)}", "--dtype float32")
        for index, piece in enumerate(pieces):
            yield index, raw(piece)


def _pieces(unit: Unit, array: mx.array) -> Iterator[tuple[mx.array, ...]]:
    if unit.kind == ROWS:
        yield layout.quantize_rows(array, unit.bits, unit.group_size)
    elif unit.kind == PLAIN:
        yield (array,)
    else:
        for matrix in array if array.ndim == 3 else (array,):  # of each expert
            for start in range(0, len(matrix), unit.band):  # band by band takes less memory
                part = matrix[start : start + unit.band]
                yield layout.quantize(part, unit.bits, unit.group_size, unit.band)


def _check(unit: Unit, array: mx.array, pieces: tuple[mx.array, ...]) -> None:
    """Raise BackendError if the first piece stands for something else than its part of the tensor.

    A corner of it is looked at.
    """
    if unit.kind == ROWS:
        corner, (codes, *grid) = _corner(array), [_corner(piece) for piece in pieces]
    else:
        matrix = array[0] if array.ndim == 3 else array
        corner, (codes, *grid) = matrix[: unit.band, :CORNER], [piece[:, :CORNER] for piece in pieces]
    corner, scales, biases = (mx.contiguous(each.astype(mx.float32)) for each in (corner, *grid))
    packed = mx.contiguous(codes), scales, biases
    if unit.kind == ROWS:
        found = mx.dequantize(*packed, unit.group_size, unit.bits)
    else:
        found = layout.dequantize(
            *packed, outputs=corner.shape[0], bits=unit.bits, group_size=unit.group_size
        )
    off, step, size = (mx.abs(each).mean() for each in (found - corner, scales, corner))
    if not (off <= step / 2 + NARROW * size).item():
        raise BackendError(f"this device quantizes {unit.name} to something else", "report it: spqt doctor")


def _corner(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])[:CORNER]


def _name(unit: Unit) -> str:
    return str(unit.dtype).removeprefix("mlx.core.")


def _evaluate(unit: Unit, *arrays: mx.array) -> None:
    """Evaluate arrays; a failed read or allocation becomes an SpqtError."""
    try:
        mx.eval(*arrays)
    except RuntimeError as error:
        if "alloc" in str(error):
            raise ResourceError(
                f"tensor {unit.name} does not fit in memory", "close other programs"
            ) from None
        raise SpqtError(f"tensor {unit.name} can't be read: {error}", AGAIN) from None


def is_finite(array: mx.array) -> bool:
    """True if no element of an evaluated array is NaN or Inf.

    Those have all exponent bits set. Comparing bits as integers, in steps that stay in the cache, was
    10 to 40 times as fast as isfinite on the CPU and takes no memory worth counting.
    """
    if array.dtype not in EXPONENTS:
        return True
    integer, magnitude, exponent = EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(integer)
    steps = range(0, bits.size, CHECKED_AT_ONCE)
    return all(bool(((bits[i : i + CHECKED_AT_ONCE] & magnitude).max() < exponent).item()) for i in steps)


def raw(array: mx.array) -> memoryview:
    """The bytes of an evaluated array, without a copy where it is contiguous."""
    if not array.size:
        return memoryview(b"")
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
    mx.eval(flat)
    return np.asarray(flat).data
