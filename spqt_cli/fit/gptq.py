"""Error-compensating rounding of matrices in the Zigzag layout.

Arrays in, arrays out: it knows no model and no files. hessian.py says in which order channels are rounded and
towards what, compensate.py rounds, `format.layout` packs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends.select import backend
from spqt_cli.convert.encode import NotFinite
from spqt_cli.errors import BackendError, SpqtError
from spqt_cli.fit import compensate
from spqt_cli.fit.hessian import Inputs
from spqt_cli.fit.products import joined
from spqt_cli.format import layout

Rounder = Callable[[Any, np.ndarray, int, int, mx.Dtype], tuple[np.ndarray, np.ndarray, np.ndarray]]

CHECKED = 100  # channels of the problem that a kernel is checked by
AGREE, TIPPED = 1e-3, 0.1  # relative difference of a value, and the part of values that may be beyond it


@dataclass(frozen=True)
class Solution:
    """A rounded matrix as `format.layout` stores it, and what was done otherwise than asked for, and why.

    weight: (bands, inputs, band * bits / 32), uint32; scales, biases: (bands, inputs, band / group_size).
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    note: str = ""


@dataclass(frozen=True)
class Form:
    """How a matrix is stored. dtype: of scales and biases."""

    bits: int
    group_size: int
    band: int
    dtype: mx.Dtype


def solve(matrices: Sequence[Any], forms: Sequence[Form], inputs: Inputs) -> list[Solution]:
    """Matrices of the same inputs, rounded so that their products with them change least.

    matrices: (outputs, inputs) float32 each, of numpy or of MLX. What does not depend on them is done once,
    and those of the same bits, group size and dtype are rounded together. Raises NotFinite for a matrix,
    SpqtError where scales do not fit the dtype.
    """
    if not all(mx.isfinite(w).all() if isinstance(w, mx.array) else np.isfinite(w).all() for w in matrices):
        raise NotFinite
    if not inputs.are_finite or inputs.factor is None:
        unfit = inputs.note if inputs.are_finite else "its inputs are not finite"
        return [plain(w, form, f"plainly rounded: {unfit}") for w, form in zip(matrices, forms, strict=True)]
    found: dict[int, Solution] = {}
    for alike in _alike(forms):
        solutions = _rounded([matrices[i] for i in alike], [forms[i] for i in alike], inputs, inputs.factor)
        found |= zip(alike, solutions, strict=True)
    return [found[i] for i in range(len(forms))]


def _alike(forms: Sequence[Form]) -> list[list[int]]:
    """The numbers of forms that differ in their bands alone."""
    found: dict[tuple[int, int, mx.Dtype], list[int]] = {}
    for i, form in enumerate(forms):
        found.setdefault((form.bits, form.group_size, form.dtype), []).append(i)
    return list(found.values())


def _rounded(matrices: list[Any], forms: list[Form], inputs: Inputs, factor: np.ndarray) -> list[Solution]:
    order, one = inputs.order, forms[0]
    columns = [_columns(w, order, one.group_size) for w in matrices]
    ends = np.cumsum([part.shape[1] for part in columns])[:-1]
    target = joined(columns, 1)
    del columns
    parts = _rounder(one.bits, one.group_size, one.dtype)(target, factor, one.bits, one.group_size, one.dtype)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    codes = np.split(parts[0], ends, axis=1)
    grids = [np.split(part, ends // one.group_size, axis=1) for part in parts[1:]]
    found = []
    for w, form, own, scales, biases in zip(matrices, forms, codes, *grids, strict=True):
        if np.isfinite(scales).all() and np.isfinite(biases).all():
            found.append(_stored(own[back], scales[back], biases[back], len(w), form, inputs.note))
        else:
            found.append(
                plain(w, form, "plainly rounded: errors that were made up for grew beyond its dtype")
            )
    return found


def _columns(w: Any, order: np.ndarray, group_size: int) -> Any:
    """Channels first, in that order: (inputs, whole groups of outputs), float32.

    A last group that is not full is filled up with its outputs from the first on: they weigh about the same.
    """
    outputs = len(w)
    column = np.arange(-(-outputs // group_size) * group_size)
    first = column[-group_size]
    column[outputs:] = first + (column[outputs:] - first) % (outputs - first)
    if isinstance(w, mx.array):
        rows = w if len(column) == outputs else w[mx.array(column)]
        return mx.contiguous(rows.T[mx.array(order)])
    rows = w if len(column) == outputs else w[column]
    return np.ascontiguousarray(rows.T[order], dtype=np.float32)


def _rounder(bits: int, group_size: int, dtype: mx.Dtype) -> Rounder:
    """The backend's kernel, if it has one, else the definition. Raises BackendError where they differ."""
    kernel = backend().compensate
    if kernel is None:
        return compensate.compensate
    if not _agrees(kernel, bits, group_size, dtype):
        where = f"{bits} bits, groups of {group_size}"
        raise BackendError(
            f"this device rounds otherwise than defined ({where})", "SPQT_BACKEND=stock does without it"
        )
    return kernel


@cache
def _agrees(kernel: Rounder, bits: int, group_size: int, dtype: mx.Dtype) -> bool:
    """Whether a kernel gives nearly the definition's values on a small problem of two spans."""
    random = np.random.default_rng(0)
    factor = np.triu(random.normal(size=(CHECKED, CHECKED)) / CHECKED, 1).astype(np.float32)
    np.fill_diagonal(factor, 1)
    target = random.normal(size=(CHECKED, 2 * group_size)).astype(np.float32)
    values = []
    for version in (kernel, compensate.compensate):
        codes, *grid_of = version(target, factor, bits, group_size, dtype)
        scales, biases = (np.repeat(part, group_size, axis=1) for part in grid_of)
        values.append(codes * scales + biases)
    off = np.abs(values[0] - values[1])
    return bool((off <= AGREE * np.abs(values[1])).mean() > 1 - TIPPED)


def _stored(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, outputs: int, form: Form, note: str
) -> Solution:
    """Bands packed; rows that fill the last one repeat the last output."""
    size = form.group_size
    bands = -(-outputs // form.band)
    column = np.minimum(np.arange(bands * form.band), outputs - 1)
    group = np.minimum(np.arange(bands * form.band // size), codes.shape[1] // size - 1)
    weight = layout.pack(_banded(codes[:, column], bands), form.bits)
    grid_of = [mx.array(_banded(part[:, group], bands)).astype(form.dtype) for part in (scales, biases)]
    return Solution(mx.array(weight), grid_of[0], grid_of[1], note)


def _banded(rows: np.ndarray, bands: int) -> np.ndarray:
    """(inputs, bands * width) -> (bands, inputs, width)."""
    return np.ascontiguousarray(rows.reshape(len(rows), bands, -1).swapaxes(0, 1))


def plain(w: Any, form: Form, note: str = "") -> Solution:
    """The matrix, (outputs, inputs), rounded weight by weight. Raises SpqtError as `solve`."""
    narrow = mx.array(w).astype(form.dtype)
    weight, scales, biases = layout.quantize(narrow, form.bits, form.group_size, form.band)
    if not mx.isfinite(mx.stack([scales, biases])).all().item():
        raise SpqtError(f"scales do not fit {str(form.dtype).removeprefix('mlx.core.')}", "--dtype float32")
    return Solution(weight, scales, biases, note)
