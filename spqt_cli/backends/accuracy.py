"""Results of kernels held against the definition in float64, and the bound on their errors.

The bound is derived in metal/README.md. Which problems are tried is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends.interface import Rotary
from spqt_cli.format import layout

Result = tuple[list[mx.array], mx.array]  # as select.sparse_gemv returns

ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}  # half a unit in the last place
CLOSE = 0.05  # of an array's norm: a few roundings to bfloat16, grown by softmax; an error gives about 1
SMALLEST = {mx.float16: 2.0**-25, mx.bfloat16: 0.0, mx.float32: 0.0}  # half of the smallest subnormal


@dataclass
class Judgement:
    """How far outputs lie from float64, as a fraction of the bound, and what else must hold."""

    error: float
    counts: bool
    repeated: bool

    @property
    def passed(self) -> bool:
        return self.error <= 1.0 and self.counts and self.repeated

    def words(self) -> str:
        faults = [] if self.error <= 1.0 else [f"error {self.error:.3g} times the bound"]
        faults += [] if self.counts else ["wrong number of active channels"]
        faults += [] if self.repeated else ["two runs differ"]
        return ", ".join(faults) or "right"


def judge(
    x: mx.array, some: Sequence[Any], first: Result, second: Result, *, rounded: bool = False
) -> Judgement:
    """Outputs and counts of two runs against float64.

    rounded: weights may be rounded to x's dtype twice, as MLX's own CUDA matmul does.
    """
    mx.eval(first, second)
    errors, counts = [], True
    for y, matrix, active in zip(first[0], some, np.array(first[1]), strict=True):
        error, kept = _error(x, matrix, y, rounded)
        errors.append(error)
        counts = counts and int(active) == kept
    repeated = all(
        np.array_equal(_bits(a), _bits(b))
        for a, b in zip([*first[0], first[1]], [*second[0], second[1]], strict=True)
    )
    return Judgement(max(errors), counts, repeated)


def judge_rows(
    x: mx.array, some: Sequence[Any], first: Result, second: Result, *, rounded: bool = False
) -> Judgement:
    """As `judge`, of all rows of x, (..., rows, inputs); counts are (layers, rows)."""
    found = []
    for r in range(first[1].shape[1]):
        one, other = (([y[..., r : r + 1, :] for y in ys], counts[:, r]) for ys, counts in (first, second))
        found.append(judge(x[..., r : r + 1, :], some, one, other, rounded=rounded))
    return Judgement(
        max(one.error for one in found), all(one.counts for one in found), all(one.repeated for one in found)
    )


def judge_gated(apart: Result, gated: Result) -> str:
    """What is wrong with silu(gate) * up, from gate and up as they stand alone; empty if nothing is.

    The exponential may be off by a few units in the last place of float32, the product is rounded once.
    """
    (gate, up), counts = apart
    (h,), counted = gated
    exact = wide(gate) / (1.0 + np.exp(-wide(gate))) * wide(up)
    bound = (ROUNDING[h.dtype] + 2.0**-20) * np.abs(exact) + SMALLEST[h.dtype] + 1e-37
    if not np.array_equal(np.array(counts), np.array(counted)):
        return "wrong number of active channels behind silu(gate) * up"
    return "" if bool(np.all(np.abs(wide(h) - exact) <= bound)) else "silu(gate) * up is off"


def judge_residual(apart: Result, residual: mx.array, added: Result) -> str:
    """What is wrong with y + residual, from y as it stands alone; empty if nothing is."""
    ((y,), counts), ((found,), counted) = apart, added
    if not np.array_equal(np.array(counts), np.array(counted)):
        return "wrong number of active channels behind y + residual"
    right = (y.astype(mx.float32) + residual.astype(mx.float32)).astype(y.dtype)
    return "" if np.array_equal(_bits(found), _bits(right)) else "y + residual is off"


def judge_mixture(
    logits: mx.array,
    h: mx.array,
    y: mx.array,
    runs: Sequence[tuple[mx.array, mx.array, mx.array]],
    *,
    of_all: bool,
) -> str:
    """What is wrong with chosen experts, their weights, and h + the weighted sum of y; empty if nothing is.

    logits: (..., experts); y: (chosen, width); runs: two of indices, weights and sum. The bounds are those of
    `judge`: 64 float32 roundings and one for each term, here also those of a difference in an exponent.
    """
    mx.eval(runs)
    (indices, weights, found), again = ([np.array(wide(one)) for one in run] for run in runs)
    if any(not np.array_equal(a, b) for a, b in zip((indices, weights, found), again, strict=True)):
        return "two runs differ"
    numbers = wide(logits).ravel()
    order = np.argsort(-numbers, kind="stable")[: len(indices)]
    if not np.array_equal(indices, order):
        return "other experts are chosen"
    powers = np.exp(numbers - numbers.max())
    exact = powers[order] / powers[slice(None) if of_all else order].sum()
    terms = len(numbers) + 64 + 8 * np.ptp(numbers)
    if np.any(np.abs(weights - exact) > terms * ROUNDING[mx.float32] * exact):
        return "weights of experts are off"
    products = weights[:, None] * wide(y)
    total = products.sum(axis=0)
    bound = (len(order) + 64) * ROUNDING[mx.float32] * np.abs(products).sum(axis=0)
    right = total + wide(h).ravel()
    bound += ROUNDING[h.dtype] * (np.abs(total) + np.abs(right)) * 1.01 + 2 * SMALLEST[h.dtype]
    return "" if np.all(np.abs(found.ravel() - right) <= bound) else "the sum over experts is off"


def judge_rotary(apart: Result, turns: mx.array, turned: Result, form: Rotary) -> str:
    """What is wrong with turned heads, from the products as they stand alone; empty if nothing is.

    A pair's two products and their sum are each rounded in float32, the result once more.
    """
    (ys, counts), (found, counted) = apart, turned
    if not np.array_equal(np.array(counts), np.array(counted)):
        return "wrong number of active channels behind turned heads"
    cosines, sines = np.split(wide(turns), 2)
    for p, (y, z) in enumerate(zip(ys, found, strict=True)):
        exact = wide(y).reshape(-1, form.head)
        size = np.abs(exact)
        if p < form.rotated:
            half, dims = form.dims // 2, form.dims
            firsts = slice(0, dims, 2) if form.traditional else slice(0, half)
            seconds = slice(1, dims, 2) if form.traditional else slice(half, dims)
            a, b = exact[:, firsts].copy(), exact[:, seconds].copy()
            exact[:, firsts], exact[:, seconds] = a * cosines - b * sines, a * sines + b * cosines
            size[:, firsts] = size[:, seconds] = np.abs(a) + np.abs(b)
        bound = (ROUNDING[z.dtype] + 2.0**-22) * size + SMALLEST[z.dtype] + 1e-37
        if not bool(np.all(np.abs(wide(z).reshape(exact.shape) - exact) <= bound)):
            return "turned heads are off"
    return ""


def judge_weights(matrix: Any, first: mx.array, second: mx.array) -> str:
    """What is wrong with dequantized weights of two runs, (inputs, outputs or more); empty if nothing is.

    A weight is computed with one rounding in float32, and rounded once more to the array's dtype.
    """
    w, sizes = reference(matrix)
    bound = ROUNDING[first.dtype] * np.abs(w) + 2.0**-23 * sizes + SMALLEST[first.dtype] + 1e-37
    share = np.abs(wide(first).T[: len(w)] - w) / bound
    worst = float(np.max(np.where(np.isfinite(share), share, np.inf)))
    found = Judgement(worst, counts=True, repeated=np.array_equal(_bits(first), _bits(second)))
    return "" if found.passed else found.words()


def _error(x: mx.array, matrix: Any, y: mx.array, rounded: bool) -> tuple[float, int]:
    """The largest error as a fraction of the bound, and the number of active channels."""
    kept = ~np.array(layout.inactive(x, matrix.threshold)).ravel()
    values = np.where(kept, wide(x).ravel(), 0.0)
    w, sizes = reference(matrix)
    bias = matrix.get("bias")
    extra = 0.0 if bias is None else wide(bias)
    exact = w @ values + extra
    size = sizes @ np.abs(values) + np.abs(extra)
    sums = ((int(kept.sum()) + 64) * 2.0**-24 + 2 * rounded * ROUNDING[x.dtype]) * size
    bound = sums + ROUNDING[x.dtype] * (np.abs(exact) + sums) + SMALLEST[x.dtype] + 1e-37
    share = np.abs(wide(y).ravel() - exact) / bound
    return float(np.max(np.where(np.isfinite(share), share, np.inf))), int(kept.sum())


def reference(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """The weights, and how large a term of each can be, both (outputs, inputs) float64; made once."""
    made: dict[str, Any] = matrix.__dict__
    if "_reference" not in made:
        scales, biases = matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32)
        how = {"outputs": matrix.outputs, "bits": matrix.bits, "group_size": matrix.group_size}
        top = 2**matrix.bits + 1  # the largest code, and 2 for a word's top code, summed with those below
        # In float32 the code times the scale is off by one rounding, its sum with the bias by another.
        w = wide(layout.dequantize(matrix.weight, scales, biases, **how))
        made["_reference"] = w, wide(_spread(mx.abs(scales) * top + mx.abs(biases), matrix))
    w, sizes = made["_reference"]
    return w, sizes


def _spread(per_group: mx.array, matrix: Any) -> mx.array:
    """(bands, inputs, groups) -> (outputs, inputs)."""
    every = mx.repeat(per_group, matrix.group_size, axis=2)
    return every.swapaxes(1, 2).reshape(-1, every.shape[1])[: matrix.outputs]


def close(found: mx.array, expected: mx.array) -> bool:
    """Whether one array is the other but for rounding: of code that was arranged anew, not of a kernel."""
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    return a.shape == b.shape and bool((mx.linalg.norm(a - b) <= CLOSE * mx.linalg.norm(b)).item())


def wide(array: mx.array) -> np.ndarray:
    """The array in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
