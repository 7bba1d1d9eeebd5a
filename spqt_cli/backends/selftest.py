"""Runs a backend's kernels on random problems against the definition in float64: `spqt doctor --selftest`.

It owns the problems; accuracy.py says how far results may lie from the reference.
"""

import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends import accuracy, kernels
from spqt_cli.backends.gpu import launch_plan
from spqt_cli.backends.gpu.kernel_text import Rotary
from spqt_cli.backends.gpu.launch_plan import Form
from spqt_cli.backends.kernels import Norm
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout


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
    active: float | int = 0.5  # a share, or so many channels


def run() -> list[dict[str, Any]]:
    """Rows for people: kernel, shape, bits, group, dtype, worst error as a share of the bound, pass.

    GPU kernels run here whatever an earlier check of them said.
    """
    from spqt_cli.backends.gpu import first_use

    with first_use.suspended():
        return [*_sparse_rows(), *_reduction_rows(), *_dense_rows()]


def _half_sums() -> bool:
    """Whether float16 is added up in float16, as MLX's CPU matmul does: then only float32 can be judged."""
    return kernels.backend().name == "stock"


def _sparse_rows() -> list[dict[str, Any]]:
    rows = []
    for name, case in _cases():
        if _half_sums() and case.dtype != mx.float32:
            continue
        try:
            worst = _worst(case, kernels.sparse_gemv)
        except RuntimeError as fault:  # MLX's word for a kernel that does not compile or start
            rows.append(_row(name, case, str(fault).strip().splitlines()[0][:60], False))
            continue
        rows.append(_row(name, case, f"{worst.error:.3f}" if worst.error < 1e3 else "inf", worst.passed))
    return rows


def _reduction_rows() -> list[dict[str, Any]]:
    """Launches of a GPU that do more: norms before the product, and reductions that do not just add up."""
    from spqt_cli.backends.gpu import backend as gpu
    from spqt_cli.backends.gpu import first_use

    if not kernels.on_gpu():
        return []
    rows = []
    turned = Rotary(64, 48, traditional=False, rotated=2)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        norm = Norm(mx.ones((first_use.INPUTS,), dtype), 1e-5)
        kinds = [
            ("silu(gate) * up", Form(then="glu", norm=norm), (320, 320)),
            ("residual", Form(then="residual"), (320,)),
            ("turned heads", Form(then=turned, norm=norm), (320, 64, 64)),
        ]
        for name, form, outputs in kinds:
            case = Case(outputs, first_use.INPUTS, dtype=dtype)
            layers = matrices(case)
            cut = gpu.choose(layers, dtype)._replace(stripe=first_use.INPUTS // 2)
            try:
                fault = first_use.fault(dtype, layers, cut, form)
            except RuntimeError as error:
                fault = str(error).strip().splitlines()[0]
            rows.append(_row(name, case, fault[:60] or "equal", not fault))
    return rows


def _dense_rows() -> list[dict[str, Any]]:
    dtypes = (mx.float32,) if _half_sums() else (mx.float32, mx.float16, mx.bfloat16)
    rows = []
    for count, dtype in itertools.product((1, 3, 40), dtypes):
        case = Case((1000,), 777, dtype=dtype, bias=True)
        name = f"{count} dense row{'s' * (count > 1)}"
        try:
            share = _many_rows(case, count)
        except RuntimeError as fault:
            rows.append(_row(name, case, str(fault).strip().splitlines()[0][:60], False))
            continue
        rows.append(_row(name, case, f"{share:.3f}", share <= 1.0))
    return rows


def _row(name: str, case: Case, error: str, passed: bool) -> dict[str, Any]:
    shape = f"{'+'.join(map(str, case.outputs))}x{case.inputs}"
    dtype = str(case.dtype).rsplit(".", maxsplit=1)[-1]
    return {
        "kernel": name,
        "shape": shape,
        "bits": case.bits,
        "group": case.group_size,
        "dtype": dtype,
        "worst error": error,
        "pass": passed,
    }


def _cases() -> list[tuple[str, Case]]:
    dtypes = (mx.float16, mx.bfloat16, mx.float32)
    one = [Case((1000,), 777, bits, group, dtype) for bits, group, dtype in _variants(dtypes)]
    cases = [("one launch", case) for case in one]
    cases += [
        ("stripes", Case((2100,), 1111, bits, 64, dtype))
        for bits, dtype in itertools.product((3, 4, 8), dtypes)
    ]
    hazards = [((4095,), 300), ((576,), 576), ((11008,), 257), ((64,), 1), ((1,), 4096), ((1024,), 11008)]
    cases += [("shape", Case(outputs, inputs)) for outputs, inputs in hazards]
    cases += [("shape", Case(outputs, inputs, dtype=mx.float32)) for outputs, inputs in hazards[:3]]
    cases += [
        ("fused", Case((4096, 1024, 1024), 512)),
        ("fused", Case((2752, 2752), 600, bits=3)),
        ("bias", Case((960,), 2000, bias=True)),
        ("fused bias", Case((320, 64), 4000, bias=True)),
        ("channel thresholds", Case((960,), 2000, per_channel=True)),
    ]
    return cases


def _variants(dtypes: Sequence[mx.Dtype]) -> list[tuple[int, int, mx.Dtype]]:
    every_width = [(bits, 64, mx.float16) for bits in layout.BITS]
    rest = list(itertools.product((4,), layout.GROUP_SIZES, dtypes))
    return list(dict.fromkeys(every_width + rest))


def _worst(case: Case, sparse_gemv: Any) -> accuracy.Judgement:
    """The worst over none, one, a quarter, half, three quarters and all of the channels active."""
    some = matrices(case)
    rounded = kernels.on_gpu() and launch_plan.tiny(some)  # MLX's own matmul runs
    found = []
    for active in (0, 1, 0.25, 0.5, 0.75, 1.0):
        x = vector(case, active)
        first, second = sparse_gemv(x, some), sparse_gemv(x, some)
        found.append(accuracy.judge(x, some, first, second, rounded=rounded))
    return accuracy.Judgement(
        max(one.error for one in found), all(one.counts for one in found), all(one.repeated for one in found)
    )


def matrices(case: Case) -> list[ZigzagLinear]:
    """Random matrices of a case, and thresholds near 1: see `vector`."""
    made = []
    for p, outputs in enumerate(case.outputs):
        keys = mx.random.split(mx.random.key(17 + p), 3)
        w = (mx.random.normal((outputs, case.inputs), key=keys[0]) * 0.1).astype(case.scales or case.dtype)
        band = case.band or layout.band_of(outputs, case.group_size)
        packed = layout.quantize(w, case.bits, case.group_size, band)
        spread = mx.random.uniform(0.9, 1.1, (case.inputs if case.per_channel else 1,), key=keys[1])
        matrix = ZigzagLinear(outputs, case.bits, case.group_size, band)
        matrix.weight, matrix.scales, matrix.biases = packed
        matrix.set_threshold(spread)
        if case.bias:
            matrix.bias = mx.random.normal((outputs,), key=keys[2]).astype(case.dtype)
        mx.eval(matrix.parameters())
        made.append(matrix)
    return made


def vector(case: Case, active: float | int | None = None) -> mx.array:
    """An x of (1, 1, inputs) with a share, or a number, of its channels above every threshold."""
    wanted = case.active if active is None else active
    count = wanted if isinstance(wanted, int) else round(wanted * case.inputs)
    random = np.random.default_rng(23)
    sizes = random.uniform(0.0, 0.85, case.inputs)
    sizes[random.permutation(case.inputs)[:count]] = random.uniform(1.15, 3.0, count)
    signed = sizes * random.choice((-1.0, 1.0), case.inputs)
    return mx.array(signed.astype(np.float32)).astype(case.dtype).reshape(1, 1, case.inputs)


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


def _many_rows(case: Case, count: int) -> float:
    """The largest error of a matmul of many rows, as a share of its bound.

    Kernels for many rows may round weights to x's dtype, multiply as tensor units do (TF32: 10 bits of
    mantissa for float32) and add up blocks in x's dtype: 4 roundings of a term to the coarser of the two.
    """
    (matrix,) = matrices(case)
    x = mx.random.normal((1, count, case.inputs), key=mx.random.key(29)).astype(case.dtype)
    w, sizes = accuracy.reference(matrix)
    exact = accuracy.wide(x)[0] @ w.T + accuracy.wide(matrix.bias)
    size = np.abs(accuracy.wide(x)[0]) @ sizes.T + np.abs(accuracy.wide(matrix.bias))
    bound = 4 * max(accuracy.ROUNDING[case.dtype], 2.0**-11) * size
    return float(np.max(np.abs(accuracy.wide(kernels.matmul(x, matrix))[0] - exact) / bound))


def cache_folder() -> Path:
    """Where spqt keeps what it can measure again."""
    home = Path("~/Library/Caches" if platform.system() == "Darwin" else "~/.cache").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "spqt"
