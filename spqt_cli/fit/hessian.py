"""What the inputs of a layer say about rounding it: the order of channels, and factors of the Hessian.

Projections of one input share it, and each factor is computed once. Its sums are in float64, in place: a wide
layer's Hessian takes gigabytes.
"""

from functools import cached_property
from typing import Any

import numpy as np

from spqt_cli.fit.products import product

BLOCK = 256  # rows of the factorization
TRIES = 4  # of the factorization, each with ten times the damping
FLAT = 0.1  # a ridge from which float32 is exact enough: it bounds the condition by inputs / ridge


class Inputs:
    """Sums over the rows of X (rows, inputs), which a layer will see, and of S, the source model's inputs.

    hessian: (inputs, inputs), X^T X. cross: (inputs, inputs), (S - X)^T X: targets move by the part `alpha`
    of what makes up for S - X. damping, ridge: parts of the mean of the Hessian's diagonal, added to it to
    round and to move. Arrays are float32 or float64, and must stay as they are.
    """

    def __init__(
        self,
        hessian: np.ndarray,
        cross: np.ndarray | None = None,
        *,
        alpha: float = 0.0,
        damping: float = 0.01,
        ridge: float = 1.0,
    ) -> None:
        self.hessian, self.damping, self.ridge = hessian, damping, ridge
        self.cross, self.alpha = (cross, alpha) if alpha else (None, 0.0)
        self.note = ""

    @cached_property
    def are_finite(self) -> bool:
        """Whether no sum is NaN or Inf."""
        return bool(np.isfinite(self.hessian).all() and (self.cross is None or np.isfinite(self.cross).all()))

    @cached_property
    def order(self) -> np.ndarray:
        """The channels, those with the largest inputs first: (inputs,) int64."""
        return np.argsort(-self.diagonal, kind="stable")

    @cached_property
    def diagonal(self) -> np.ndarray:
        """Of the Hessian: (inputs,)."""
        return np.diagonal(self.hessian)

    @cached_property
    def factor(self) -> np.ndarray | None:
        """U, unit upper triangular, (inputs, inputs) float32: U diag U^T is the damped Hessian in `order`.

        None where it is not positive definite even with far more damping. A channel that is always zero
        depends on no other.
        """
        for damping in (self.damping * 10**attempt for attempt in range(TRIES)):
            lower = self._unit_lower(self.order[::-1], damping)
            if lower is not None:
                if damping != self.damping:
                    self.note = f"damping {damping:g}: with less its Hessian is not positive definite"
                return np.ascontiguousarray(lower[::-1, ::-1], dtype=np.float32)
        self.note = "its Hessian is not positive definite"
        return None

    def _unit_lower(self, order: np.ndarray, damping: float) -> np.ndarray | None:
        """The lower factor of the damped Hessian in an order, its diagonal at one; None without one."""
        mean = self.mean or 1.0
        lower = self.hessian[np.ix_(order, order)].astype(np.float64)
        dead = np.diagonal(lower) == 0
        lower[dead] = lower[:, dead] = 0
        lower.flat[:: len(lower) + 1] += damping * mean + mean * dead
        if not cholesky(lower):
            return None
        lower /= np.diagonal(lower).copy()
        return lower

    def moved(self, w: np.ndarray) -> np.ndarray:
        """W + alpha W D (H + ridge mean I)^-1, the target for inputs X that were to be S; D is `cross`.

        w: (outputs, inputs) float32; so is what it returns.
        """
        if self.cross is None or self._ridged is None:
            return w
        change = np.ascontiguousarray(product(w, self.cross).T, dtype=self._ridged.dtype)
        substitute(self._ridged, change)
        return w + np.float32(self.alpha) * change.T.astype(np.float32)

    @cached_property
    def _ridged(self) -> Any:
        """The lower factor of H + ridge mean I; None where it has none or there are no inputs."""
        if not self.mean > 0:
            return None
        lower: np.ndarray = self.hessian.astype(np.float32 if self.ridge >= FLAT else np.float64)
        lower.flat[:: len(lower) + 1] += self.ridge * self.mean
        if cholesky(lower):
            return lower
        self.note = "target not moved: its Hessian is not positive definite"
        return None

    @cached_property
    def mean(self) -> float:
        """Of the Hessian's diagonal."""
        return float(self.diagonal.mean(dtype=np.float64))


def cholesky(a: np.ndarray) -> bool:
    """Put the lower factor of a symmetric matrix in its place, zeros above; False if it has none."""
    for start in range(0, len(a), BLOCK):
        end = min(start + BLOCK, len(a))
        a[start:, start:end] -= a[start:, :start] @ a[start:end, :start].T
        try:
            corner = np.linalg.cholesky(a[start:end, start:end])
            a[end:, start:end] = a[end:, start:end] @ np.linalg.inv(corner).T
        except np.linalg.LinAlgError:
            return False
        a[start:end, start:end] = corner
        a[start:end, end:] = 0
    return bool(np.isfinite(np.diagonal(a)).all())


def substitute(lower: np.ndarray, b: np.ndarray) -> None:
    """Put the solution x of L L^T x = b into b: (inputs, columns); numpy has no triangular solve."""
    corners = [slice(start, start + BLOCK) for start in range(0, len(b), BLOCK)]
    inverses = [np.linalg.inv(lower[here, here]) for here in corners]
    for here, inverse in zip(corners, inverses, strict=True):
        b[here] = inverse @ (b[here] - lower[here, : here.start] @ b[: here.start])
    for here, inverse in zip(reversed(corners), reversed(inverses), strict=True):
        b[here] = inverse.T @ (b[here] - lower[here.stop :, here].T @ b[here.stop :])
