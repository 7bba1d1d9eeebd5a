"""Error-compensating rounding of one matrix in the Zigzag layout.

Arrays in, arrays out: it knows no model and no files. hessian.py says in which order channels are rounded and
towards what, compensate.py rounds, `format.layout` packs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from spqt_cli.backends.select import backend
from spqt_cli.convert.encode import NotFinite
from spqt_cli.errors import SpqtError
from spqt_cli.fit import compensate, compensate_gpu
from spqt_cli.fit.hessian import Inputs
from spqt_cli.format import layout

Rounder = Callable[[np.ndarray, np.ndarray, int, int, mx.Dtype], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Solution:
    """A rounded matrix as `format.layout` stores it, and what was done otherwise than asked for, and why.

    weight: (bands, inputs, band * bits / 32), uint32; scales, biases: (bands, inputs, band / group_size).
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    note: str = ""


def solve(  # noqa: PLR0913 - the format, and the three numbers of the method
    w: np.ndarray,
    hessian: np.ndarray,
    *,
    bits: int,
    group_size: int,
    band: int,
    dtype: mx.Dtype,
    cross: np.ndarray | None = None,
    alpha: float = 0.0,
    damping: float = 0.01,
    ridge: float = 1.0,
) -> Solution:
    """The matrix rounded so that its products with the inputs change least.

    w: (outputs, inputs) float32. hessian, cross, alpha, damping, ridge: as for `hessian.Inputs`.
    dtype: of scales and biases. Raises NotFinite for w, SpqtError where scales do not fit dtype.
    """
    inputs = Inputs(hessian, cross, alpha=alpha, damping=damping, ridge=ridge)
    return solve_shared(w, inputs, bits=bits, group_size=group_size, band=band, dtype=dtype)


def solve_shared(
    w: np.ndarray, inputs: Inputs, *, bits: int, group_size: int, band: int, dtype: mx.Dtype
) -> Solution:
    """As `solve`, for one of several matrices of the same inputs: what does not depend on w is done once."""
    if not np.isfinite(w).all():
        raise NotFinite
    form = _Form(len(w), bits, group_size, band, dtype)
    if not inputs.are_finite:
        return _plain(w, form, "plainly rounded: its inputs are not finite")
    if inputs.factor is None:
        return _plain(w, form, f"plainly rounded: {inputs.note}")
    order = inputs.order
    target = _columns(inputs.moved(w), order, group_size)
    codes, scales, biases = _rounder()(target, inputs.factor, bits, group_size, dtype)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        return _plain(w, form, "plainly rounded: errors that were made up for grew beyond its dtype")
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return _stored(codes[back], scales[back], biases[back], form, inputs.note)


def plain(w: np.ndarray, *, bits: int, group_size: int, band: int, dtype: mx.Dtype) -> Solution:
    """The matrix, (outputs, inputs), rounded weight by weight. Raises SpqtError as `solve`."""
    return _plain(w, _Form(len(w), bits, group_size, band, dtype), "")


@dataclass(frozen=True)
class _Form:
    outputs: int
    bits: int
    group_size: int
    band: int
    dtype: mx.Dtype


def _columns(w: np.ndarray, order: np.ndarray, group_size: int) -> np.ndarray:
    """Channels first, in that order: (inputs, whole groups of outputs), float32.

    A last group that is not full is filled up with its outputs from the first on: they weigh about the same.
    """
    outputs = len(w)
    column = np.arange(-(-outputs // group_size) * group_size)
    first = column[-group_size]
    column[outputs:] = first + (column[outputs:] - first) % (outputs - first)
    rows = w if len(column) == outputs else w[column]
    return np.ascontiguousarray(rows.T[order], dtype=np.float32)


def _rounder() -> Rounder:
    """A GPU's own version, the kernel of the CPU extension where that computes, else the definition."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return compensate_gpu.compensate
    return backend().compensate or compensate.compensate


def _stored(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, form: _Form, note: str) -> Solution:
    """Bands packed; rows that fill the last one repeat the last output."""
    outputs, size = form.outputs, form.group_size
    bands = -(-outputs // form.band)
    column = np.minimum(np.arange(bands * form.band), outputs - 1)
    group = np.minimum(np.arange(bands * form.band // size), codes.shape[1] // size - 1)
    weight = layout.pack(_banded(codes[:, column], bands), form.bits)
    grid_of = [mx.array(_banded(part[:, group], bands)).astype(form.dtype) for part in (scales, biases)]
    return Solution(mx.array(weight), grid_of[0], grid_of[1], note)


def _banded(rows: np.ndarray, bands: int) -> np.ndarray:
    """(inputs, bands * width) -> (bands, inputs, width)."""
    return np.ascontiguousarray(rows.reshape(len(rows), bands, -1).swapaxes(0, 1))


def _plain(w: np.ndarray, form: _Form, note: str) -> Solution:
    narrow = mx.array(w).astype(form.dtype)
    weight, scales, biases = layout.quantize(narrow, form.bits, form.group_size, form.band)
    if not mx.isfinite(mx.stack([scales, biases])).all().item():
        raise SpqtError(f"scales do not fit {str(form.dtype).removeprefix('mlx.core.')}", "--dtype float32")
    return Solution(weight, scales, biases, note)
