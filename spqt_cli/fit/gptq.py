"""Error-compensating rounding of one matrix in the Zigzag layout.

Arrays in, arrays out: it knows no model and no files. It decides the order of channels, the largest inputs
first, their target and the factor of the Hessian; compensate.py rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from spqt_cli.backends import cpu
from spqt_cli.backends.select import backend
from spqt_cli.convert.encode import NotFinite
from spqt_cli.errors import SpqtError
from spqt_cli.fit import compensate, compensate_gpu
from spqt_cli.format import layout

BLOCK = 256  # rows of the factorization
TRIES = 4  # of the factorization, each with ten times the damping

Rounder = Callable[[np.ndarray, np.ndarray, int, int, mx.Dtype], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Solution:
    """A rounded matrix as `format.layout` stores it, and why it is plainly rounded where it is.

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

    w: (outputs, inputs) float32. hessian: (inputs, inputs) float32 or float64, X^T X summed over rows of
    X (rows, inputs), the inputs that the layer will see. cross: (inputs, inputs), (S - X)^T X with S the
    source model's inputs: the target moves by the part `alpha` of what makes up for S - X.
    damping, ridge: parts of the mean of the Hessian's diagonal, added to it to round and to move the target.
    dtype: of scales and biases. Raises NotFinite for w, SpqtError where scales do not fit dtype.
    """
    if not np.isfinite(w).all():
        raise NotFinite
    form = _Form(len(w), bits, group_size, band, dtype)
    finite = np.isfinite(hessian).all() and (cross is None or np.isfinite(cross).all())
    if not finite:
        return _plain(w, form, "plainly rounded: its inputs are not finite")
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    factor = _factor(hessian, order, damping)
    if factor is None:
        return _plain(w, form, "plainly rounded: its Hessian is not positive definite")
    target = w if cross is None or alpha == 0 else moved(w, hessian, cross, alpha, ridge)
    codes, scales, biases = _rounder()(_columns(target, order, group_size), factor, bits, group_size, dtype)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        return _plain(w, form, "plainly rounded: errors that were made up for grew beyond its dtype")
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return _stored(codes[back], scales[back], biases[back], form)


@dataclass(frozen=True)
class _Form:
    outputs: int
    bits: int
    group_size: int
    band: int
    dtype: mx.Dtype


def moved(w: np.ndarray, hessian: np.ndarray, cross: np.ndarray, alpha: float, ridge: float) -> np.ndarray:
    """W + alpha W D (H + ridge mean(diagonal) I)^-1, float32: W's target for inputs X that were to be S.

    Shapes as for `solve`; D is `cross`.
    """
    mean = np.diagonal(hessian).mean(dtype=np.float64)
    if not mean > 0:
        return w
    lhs = hessian.astype(np.float64)
    lhs.flat[:: len(lhs) + 1] += ridge * mean
    rhs = (w @ cross).astype(np.float64).T
    return w + np.float32(alpha) * np.linalg.solve(lhs, rhs).T.astype(np.float32)


def _factor(hessian: np.ndarray, order: np.ndarray, damping: float) -> np.ndarray | None:
    """U, unit upper triangular, (inputs, inputs) float32: U diag U^T is the damped Hessian in that order.

    None where it is not positive definite. A channel that is always zero depends on no other.
    """
    mean = float(np.diagonal(hessian).mean(dtype=np.float64)) or 1.0
    backwards = order[::-1]
    for attempt in range(TRIES):
        lower = hessian[np.ix_(backwards, backwards)].astype(np.float64)
        dead = np.diagonal(lower) == 0
        lower[dead] = lower[:, dead] = 0
        lower.flat[:: len(lower) + 1] += damping * mean * 10**attempt + mean * dead
        if _cholesky(lower):
            lower /= np.diagonal(lower).copy()
            return np.ascontiguousarray(lower[::-1, ::-1], dtype=np.float32)
    return None


def _cholesky(a: np.ndarray) -> bool:
    """Put the lower factor of a symmetric matrix in its place, zeros above; False if it has none.

    In place because a wide layer's takes gigabytes, and NumPy's makes two copies.
    """
    for start in range(0, len(a), BLOCK):
        end = min(start + BLOCK, len(a))
        done = a[start:end, :start]
        a[start:, start:end] -= a[start:, :start] @ done.T
        try:
            corner = np.linalg.cholesky(a[start:end, start:end])
            a[end:, start:end] = np.linalg.solve(corner, a[end:, start:end].T).T
        except np.linalg.LinAlgError:
            return False
        a[start:end, start:end] = corner
        a[start:end, end:] = 0
    return bool(np.isfinite(np.diagonal(a)).all())


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
    return cpu.compensate if backend().name == "cpu" else compensate.compensate


def _stored(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, form: _Form) -> Solution:
    """Bands packed; rows that fill the last one repeat the last output."""
    outputs, size = form.outputs, form.group_size
    bands = -(-outputs // form.band)
    column = np.minimum(np.arange(bands * form.band), outputs - 1)
    group = np.minimum(np.arange(bands * form.band // size), codes.shape[1] // size - 1)
    weight = layout.pack(_banded(codes[:, column], bands), form.bits)
    grid_of = [mx.array(_banded(part[:, group], bands)).astype(form.dtype) for part in (scales, biases)]
    return Solution(mx.array(weight), grid_of[0], grid_of[1])


def _banded(rows: np.ndarray, bands: int) -> np.ndarray:
    """(inputs, bands * width) -> (bands, inputs, width)."""
    return np.ascontiguousarray(rows.reshape(len(rows), bands, -1).swapaxes(0, 1))


def _plain(w: np.ndarray, form: _Form, note: str) -> Solution:
    narrow = mx.array(w).astype(form.dtype)
    weight, scales, biases = layout.quantize(narrow, form.bits, form.group_size, form.band)
    if not mx.isfinite(mx.stack([scales, biases])).all().item():
        raise SpqtError(f"scales do not fit {str(form.dtype).removeprefix('mlx.core.')}", "--dtype float32")
    return Solution(weight, scales, biases, note)
