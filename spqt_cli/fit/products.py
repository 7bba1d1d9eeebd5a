"""Products of many rows and their sums: by numpy's BLAS on the CPU, by MLX on a GPU."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends import cpu
from spqt_cli.format import layout
from spqt_cli.measure import many_rows

Values = Any  # activations: of MLX, or of numpy where this computes on the CPU


def local(a: Values) -> Values:
    """a as products take it: float32, on the CPU of numpy, without a copy where it is that already."""
    if isinstance(a, np.ndarray):
        return a
    a = a.astype(mx.float32)
    return np.array(a, copy=False) if many_rows.on_cpu() else a


class Gram:
    """X^T X and (S - X)^T X, summed over rows: (inputs, inputs) float32 both."""

    def __init__(self) -> None:
        self.rows = 0
        self._hessian: Any = None
        self._cross: Any = None

    def add(self, x: Values, source: Values) -> None:
        """Add rows of the compressed model's inputs x and of the source's, (..., inputs) both."""
        rows, other = (local(a.reshape(-1, a.shape[-1])) for a in (x, source))
        self.rows += len(rows)
        self._hessian = self._added(self._hessian, rows.T @ rows)
        other = other - rows
        self._cross = self._added(self._cross, other.T @ rows)
        if not many_rows.on_cpu():
            mx.eval(self._hessian, self._cross)

    @staticmethod
    def _added(sum_so_far: Any, part: Any) -> Any:
        if sum_so_far is None:
            return part
        sum_so_far += part
        return sum_so_far

    def sums(self, on_device: bool) -> tuple[Any, Any]:
        """Both sums, of MLX where `on_device`, else of numpy."""
        if on_device:
            return self._hessian, self._cross
        return np.array(self._hessian, copy=False), np.array(self._cross, copy=False)

    def give_up(self, on_device: bool) -> Any:
        """X^T X, which may be changed; nothing is kept."""
        hessian, _ = self.sums(on_device)
        self._hessian = self._cross = None
        return hessian if on_device else np.require(hessian, requirements="W")


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b of two large float32 matrices."""
    return a @ b if many_rows.on_cpu() else np.array(mx.array(a) @ mx.array(b), copy=False)


def gained(w: Any, change: Any, hessian: Any, cross: Any) -> float:
    """By how much ||(S - X) W^T||^2 falls where X gets W + change; w, change: (outputs, inputs).

    hessian, cross: the sums of `Gram` over rows of X and S. All of numpy, or all of MLX.
    """
    if isinstance(w, mx.array):
        return float(((2 * (w @ cross) - change @ hessian) * change).sum().item())
    found = 2 * product(w, cross) - product(change, hessian)
    return float((found * change).sum(dtype=np.float64))


def joined(matrices: Sequence[Any], axis: int) -> Any:
    """Matrices of numpy, or of MLX, as one."""
    if len(matrices) == 1:
        return matrices[0]
    whole = mx.concatenate if isinstance(matrices[0], mx.array) else np.concatenate
    return whole(list(matrices), axis=axis)


def masked(x: mx.array, steps: slice, threshold: float) -> Values:
    """x (texts, window, inputs) with what is below a threshold at zero in the steps along axis 1."""
    if not many_rows.on_cpu():
        part = layout.mask(x[:, steps], mx.array([threshold], mx.float32))
        return mx.concatenate([x[:, : steps.start], part], axis=1)
    rows = np.array(x.astype(mx.float32))
    ahead = rows[:, steps]
    ahead *= np.abs(ahead) >= np.float32(threshold)
    return rows


def times(x: Values, w: Any) -> mx.array:
    """x (..., inputs) times w (inputs, outputs): of numpy on the CPU, of MLX and in x's dtype on a GPU."""
    if not many_rows.on_cpu():
        return x @ w.astype(x.dtype)
    return many_rows.from_host(local(x).reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])


def slopes_by_inputs(dy: Values, w: Any) -> Any:
    """The slopes by inputs (rows, inputs) of a product with w (bands, inputs, band).

    dy: those by its outputs (rows, bands * band). All of numpy, or all of MLX.
    """
    parts = dy.reshape(len(dy), len(w), -1)
    dx = parts[:, 0] @ w[0].T
    for band in range(1, len(w)):
        dx = dx + parts[:, band] @ w[band].T
    return dx


def slopes(
    dy: Values, x: Values, w: Any, group_size: int, threads: int | None = None
) -> tuple[Any, Any, Any]:
    """`slopes_by_inputs`, and of the slopes by w's values the sums over each group of its columns, plain and
    times the values: (bands, inputs, groups) both. x: (rows, inputs). threads: the caller's part of the CPU
    where others call this meanwhile. One product by one thread of ours is two by two of BLAS's.
    """
    bands, inputs, _ = w.shape
    grouped = dy.reshape(len(dy), -1, group_size).sum(-1)
    sums = (x.T @ grouped).reshape(inputs, bands, -1).swapaxes(0, 1)
    if isinstance(w, np.ndarray) and cpu.status()[0] and (threads or 1) <= 2:
        dx, dots = cpu.slopes(dy, x, w, group_size, alone=threads is not None)
        return dx, sums, dots
    by_group = w.reshape(bands, inputs, -1, group_size)
    by_weight = (x.T @ dy).reshape(inputs, bands, -1, group_size).swapaxes(0, 1)
    dots = np.vecdot(by_weight, by_group) if isinstance(w, np.ndarray) else (by_weight * by_group).sum(-1)
    return slopes_by_inputs(dy, w), sums, dots


def unpacked(weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> Any:
    """What packed arrays (bands, inputs, ...) stand for: (bands, inputs, band) float32; of numpy on the CPU.

    scales, biases: float32. On the CPU in a third of the time that MLX takes.
    """
    if not many_rows.on_cpu():
        return mx.dequantize(weight, scales, biases, group_size, bits)
    packed = np.array(weight, copy=False)
    if 16 % bits:
        w = many_rows.codes(packed, bits).astype(np.float32)
    else:
        w = np.take(_several(bits), packed.view(np.uint16), axis=0, mode="clip")
    w = w.reshape(*scales.shape, group_size)
    w *= many_rows.host(scales)[..., None]
    w += many_rows.host(biases)[..., None]
    return w.reshape(*scales.shape[:2], -1)


@cache
def _several(bits: int) -> np.ndarray:
    """The codes in each value of 16 bits: (65536, 16 / bits) float32."""
    values = np.arange(1 << 16)[:, None] >> np.arange(0, 16, bits)
    return (values & ((1 << bits) - 1)).astype(np.float32)
