"""Scale, bias and codes of groups of values, by a search for the least squared error.

A group holds values of one input channel, so all its errors weigh the same. MLX's affine format is
value ~ code * scale + bias, code in 0 .. 2^bits - 1; scale and bias are rounded to the dtype that stores
them before codes are chosen. Sums are added in halves, an order that every instruction set can keep, so
that the kernel in cpu/ can give the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

# Parts of the range of values cut off, at either end in all combinations. With three refits the weighted
# error of SmolLM2's q and gate, 3 and 4 bits, is 0.94 of that of six evenly shrunken ranges and two refits.
CLIPPED = (0.0, 0.03, 0.06, 0.1)
REFITS = 3  # scale and bias fitted to the codes, then codes chosen anew
LEAST_SCALE = np.float32(1e-7)  # as in mx.quantize

Round = Callable[[np.ndarray], np.ndarray]


class Groups(NamedTuple):
    """codes, values: (groups, size), float32; scales, biases: (groups, 1), float32, exact in their dtype."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    values: np.ndarray  # codes * scales + biases


@np.errstate(over="ignore", invalid="ignore")  # of values too large for the dtype: no scale fits
def search(x: np.ndarray, bits: int, rounded: Round) -> Groups:
    """The best codes, scales and biases found for each group; scales are NaN where none is finite.

    x: (groups, size) float32, size a power of two; rounded: see `rounding`.
    """
    most = np.float32(2**bits - 1)
    low, high = (
        edge(x, -1, keepdims=True) + np.float32(0) for edge in (np.min, np.max)
    )  # no zero is negative
    span = high - low
    none = np.full_like(low, np.nan)
    best = Groups(np.zeros_like(x), none, none, x), np.full_like(low, np.inf)
    for below in CLIPPED:
        first = low + span * np.float32(below)
        for above in CLIPPED:
            width = high - span * np.float32(above) - first
            scales = rounded(np.maximum(width * (np.float32(1) / most), LEAST_SCALE))
            best = _better(x, best, scales, rounded(first), most)
    mean = _sum(x) * np.float32(1 / x.shape[-1])
    for _ in range(REFITS):
        codes, scales, *_ = best[0]
        centre = _sum(codes) * np.float32(1 / x.shape[-1])
        off = codes - centre
        slope = _sum(off * x) / np.maximum(_sum(off * off), np.float32(1e-9))
        scales = rounded(np.where(np.abs(slope) < LEAST_SCALE, scales, slope))
        best = _better(x, best, scales, rounded(mean - scales * centre), most)
    return best[0]


def _better(
    x: np.ndarray, best: tuple[Groups, np.ndarray], scales: np.ndarray, biases: np.ndarray, most: np.float32
) -> tuple[Groups, np.ndarray]:
    """The best groups before with their squared errors, and the new ones where their errors are smaller."""
    codes = np.rint(np.clip((x - biases) * (np.float32(1) / scales), np.float32(0), most))
    values = codes * scales + biases
    off = values - x
    squares = _sum(off * off)
    wins = squares < best[1]
    new = (codes, scales, biases, values)
    chosen = Groups(*(np.where(wins, one, old) for one, old in zip(new, best[0], strict=True)))
    return chosen, np.where(wins, squares, best[1])


def _sum(x: np.ndarray) -> np.ndarray:
    """Sums over the last axis, a power of two long, halves added: (..., 1)."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x


def rounding(dtype: mx.Dtype) -> Round:
    """The function that rounds float32 values to a dtype, and gives them in float32; too large: Inf."""
    return {mx.float16: _to_half, mx.bfloat16: _to_bfloat, mx.float32: _to_float}[dtype]


def _to_half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _to_bfloat(x: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isnan(x), x, ((raw + (0x7FFF + (raw >> 16 & 1))) & 0xFFFF0000).view(np.float32))


def _to_float(x: np.ndarray) -> np.ndarray:
    return x
