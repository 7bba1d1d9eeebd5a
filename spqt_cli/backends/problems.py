"""Random problems that kernels are tried on: packed matrices, inputs, norms. Judges nothing."""

import dataclasses
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from spqt_cli.backends import accuracy
from spqt_cli.backends.interface import Norm
from spqt_cli.format import layout

PACKED = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Case:
    """One problem: projections of one input."""

    outputs: tuple[int, ...]
    inputs: int
    bits: int = 4
    group_size: int = 64
    dtype: mx.Dtype = mx.float16
    scales: mx.Dtype | None = None  # of scales and biases; x's unless said
    band: int | None = None
    bias: bool = False
    per_channel: bool = False
    active: float | int = 0.5  # a fraction, or a number of channels


class Matrix(nn.Module):
    """A packed matrix with its threshold: an `interface.Projection` and no layer of a model."""

    def __init__(
        self, outputs: int, bits: int, group_size: int, packed: tuple[mx.array, mx.array, mx.array]
    ) -> None:
        super().__init__()
        self.outputs, self.bits, self.group_size = outputs, bits, group_size
        self.weight, self.scales, self.biases = packed
        self._threshold: mx.array | None = None

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def threshold(self) -> mx.array | None:
        return self._threshold

    def set_threshold(self, threshold: float | mx.array | None) -> None:
        """Skip channels below `threshold`, (1,) or (inputs,); None skips none."""
        given = None if threshold is None else mx.array(threshold, dtype=mx.float32).reshape(-1)
        object.__setattr__(self, "_threshold", given)


def matrices(case: Case) -> list[Matrix]:
    """Random matrices of a case, and thresholds near 1: see `vector`."""
    made = []
    for p, outputs in enumerate(case.outputs):
        keys = mx.random.split(mx.random.key(17 + p), 3)
        w = (mx.random.normal((outputs, case.inputs), key=keys[0]) * 0.1).astype(case.scales or case.dtype)
        band = case.band or layout.band_of(outputs, case.group_size)
        packed = layout.quantize(w, case.bits, case.group_size, band)
        spread = mx.random.uniform(0.9, 1.1, (case.inputs if case.per_channel else 1,), key=keys[1])
        matrix = Matrix(outputs, case.bits, case.group_size, packed)
        matrix.set_threshold(spread)
        if case.bias:
            matrix.bias = mx.random.normal((outputs,), key=keys[2]).astype(case.dtype)
        mx.eval(matrix.parameters())
        made.append(matrix)
    return made


def experts(case: Case, count: int) -> tuple[list[list[Matrix]], list[Matrix]]:
    """Random experts: of each its projections, as `matrices` makes them, and for each projection all of its
    experts stacked. One threshold, and no bias.
    """
    some = matrices(dataclasses.replace(case, outputs=case.outputs * count))
    width = len(case.outputs)
    alone = [some[e * width : (e + 1) * width] for e in range(count)]
    stacks = []
    for of_projection in zip(*alone, strict=True):
        first = of_projection[0]
        w, scales, biases = (mx.stack([one[name] for one in of_projection]) for name in PACKED)
        stacks.append(Matrix(first.outputs, case.bits, case.group_size, (w, scales, biases)))
        for one in (*of_projection, stacks[-1]):
            one.set_threshold(first.threshold)
        mx.eval(stacks[-1].parameters())
    return alone, stacks


def vector(case: Case, active: float | int | None = None) -> mx.array:
    """An x of (1, 1, inputs) with a fraction, or a number, of its channels above every threshold."""
    wanted = case.active if active is None else active
    count = wanted if isinstance(wanted, int) else round(wanted * case.inputs)
    random = np.random.default_rng(23)
    sizes = random.uniform(0.0, 0.85, case.inputs)
    sizes[random.permutation(case.inputs)[:count]] = random.uniform(1.15, 3.0, count)
    signed = sizes * random.choice((-1.0, 1.0), case.inputs)
    return mx.array(signed.astype(np.float32)).astype(case.dtype).reshape(1, 1, case.inputs)


def rows(case: Case, count: int) -> mx.array:
    """An x of (1, count, inputs): rows as `vector` makes them, each with channels and a share of its own."""
    random = np.random.default_rng(47)
    some = []
    for share in np.linspace(0.2, 0.8, count):
        row = accuracy.wide(vector(case, float(share))).ravel()
        some.append(row[random.permutation(case.inputs)])
    return mx.array(np.stack(some).astype(np.float32)).astype(case.dtype)[None]


def before_norm(case: Case) -> tuple[mx.array, Norm, mx.array]:
    """An x, a norm, and what that makes of x: much like `vector`, and the same however squares are added up.

    The mean square plus eps is 4, so that x is halved: no rounding hangs on the last bit of a sum. Two
    channels make up for what the others lack.
    """
    wanted = accuracy.wide(vector(case)).ravel()
    weight = np.random.default_rng(41).uniform(1.0, 4.0, case.inputs)
    weight[:2] = 0.25
    eps = 0.25

    def rounded(values: np.ndarray) -> np.ndarray:
        return accuracy.wide(mx.array(values.astype(np.float32)).astype(case.dtype))

    weight = rounded(weight)
    x = rounded(2.0 * wanted / weight)
    x[:2] = 0.0
    lacking = (4.0 - eps) * case.inputs - np.square(x).sum()
    x[0] = rounded(np.sqrt(lacking) * (1.0 - 2.0**-7))
    x[1] = rounded(np.sqrt(lacking - x[0] ** 2))
    arrays = [
        mx.array(one.astype(np.float32)).astype(case.dtype) for one in (x, weight, rounded(x / 2) * weight)
    ]
    return arrays[0].reshape(1, 1, -1), Norm(arrays[1], eps), arrays[2].reshape(1, 1, -1)
