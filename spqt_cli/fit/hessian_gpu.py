"""As hessian.py, with sums, factors and solutions on a GPU: those of a wide layer take a host a minute.

They are in float32, which is exact enough: what rounding adds to a factorization is about 1e-7 of the largest
eigenvalue, that is at most `inputs` times the mean of the diagonal, and damping is 1e-2 of the mean. Products
must be of float32 then: MLX's are of TF32 where a GPU has it, unless its environment says otherwise.
"""

import os
from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.fit.hessian import Inputs
from spqt_cli.measure import many_rows

BLOCK = 512  # rows of the factorization, whose corners a host factors
EXACT = 1e-5  # relative error of a product of float32; TF32's is 3e-4


def ask_for_float32() -> None:
    """Have MLX multiply float32 as such; it looks only once, before its first product of them."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


@cache
def are_exact() -> bool:
    """Whether this process multiplies float32 as such."""
    a = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    wanted = a.astype(np.float64) @ a
    off = np.abs(np.array(mx.array(a) @ mx.array(a)) - wanted).mean()
    return bool(off < EXACT * np.abs(wanted).mean())


def on_device() -> bool:
    """Whether sums stay on the default device: a GPU whose products are of float32."""
    return not many_rows.on_cpu() and are_exact()


def inputs_of(hessian: Any, cross: Any = None, *, alpha: float = 0.0) -> Inputs:
    """`Inputs` of arrays of numpy, or of MLX."""
    kind = DeviceInputs if isinstance(hessian, mx.array) else Inputs
    return kind(hessian, cross, alpha=alpha)


class DeviceInputs(Inputs):
    """`Inputs` of MLX arrays, float32."""

    hessian: Any
    cross: Any

    @cached_property
    def are_finite(self) -> bool:
        return all(mx.isfinite(a).all().item() for a in (self.hessian, self.cross) if a is not None)

    @cached_property
    def diagonal(self) -> np.ndarray:
        return np.array(mx.diagonal(self.hessian))

    def moved(self, w: Any) -> Any:
        """As `Inputs.moved`, of MLX arrays."""
        if self.cross is None or self._ridged is None:
            return w
        lower, inverses = self._ridged
        return w + self.alpha * substitute(lower, inverses, (w @ self.cross).T).T

    def _unit_lower(self, order: np.ndarray, damping: float) -> np.ndarray | None:
        index, dead = mx.array(order.copy()), mx.array(self.diagonal[order] == 0)
        a = mx.where(dead[:, None] | dead, 0, self.hessian[index][:, index])
        added = mx.where(dead, 1 + damping, damping) * (self.mean or 1.0)
        factored = cholesky(a + mx.diag(added.astype(mx.float32)))
        if factored is None:
            return None
        lower = factored[0]
        return np.array(lower / mx.diagonal(lower))

    @cached_property
    def _ridged(self) -> Any:
        if not self.mean > 0:
            return None
        ridge = mx.full((len(self.diagonal),), self.ridge * self.mean)
        factored = cholesky(self.hessian + mx.diag(ridge))
        if factored is None:
            self.note = "target not moved: its Hessian is not positive definite"
        return factored


def cholesky(a: mx.array) -> tuple[mx.array, list[mx.array]] | None:
    """The lower factor of a symmetric matrix and the inverses of its corners; None if it has none.

    a: (n, n) float32. inverses: (BLOCK, BLOCK) each, the last may be smaller.
    """
    columns, inverses = [], []
    for start in range(0, len(a), BLOCK):
        try:
            corner = np.linalg.cholesky(np.array(a[:BLOCK, :BLOCK]).astype(np.float64))
            inverses.append(mx.array(np.linalg.inv(corner).astype(np.float32)))
        except np.linalg.LinAlgError:
            return None
        if not np.isfinite(corner).all():
            return None
        below = a[BLOCK:, :BLOCK] @ inverses[-1].T
        column = mx.concatenate([mx.array(corner.astype(np.float32)), below])
        columns.append(mx.pad(column, [(start, 0), (0, 0)]))
        a = a[BLOCK:, BLOCK:] - below @ below.T
        mx.eval(a, columns[-1])
    return mx.concatenate(columns, axis=1), inverses


def substitute(lower: mx.array, inverses: list[mx.array], b: mx.array) -> mx.array:
    """The solution x of L L^T x = b: (inputs, columns). lower, inverses: as `cholesky` gives them."""
    found = []
    for k, inverse in enumerate(inverses):
        start, end = k * BLOCK, k * BLOCK + len(inverse)
        found.append(inverse @ b[: end - start])
        b = b[end - start :] - lower[end:, start:end] @ found[-1]
        mx.eval(b, found[-1])
    b = mx.concatenate(found)
    for k, inverse in reversed(list(enumerate(inverses))):
        start, end = k * BLOCK, k * BLOCK + len(inverse)
        found[k] = inverse.T @ b[start:]
        b = b[:start] - lower[start:end, :start].T @ found[k]
        mx.eval(b, found[k])
    return mx.concatenate(found)
