"""Runs a backend's kernels on random problems against the definition in float64: `spqt doctor --selftest`.

problems.py makes the problems, accuracy.py says how far results may lie from the reference.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends import accuracy, select
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, ways
from spqt_cli.backends.gpu.launch import Form, tiny
from spqt_cli.backends.gpu.launch import bands as bands_of
from spqt_cli.backends.interface import Norm, Rotary
from spqt_cli.backends.problems import Case, matrices, vector
from spqt_cli.format import layout


def run() -> list[dict[str, Any]]:
    """Rows of the table: kernel, shape, bits, group, dtype, worst error as a fraction of the bound, pass.

    GPU kernels run here whatever an earlier check of them said.
    """
    with first_use.suspended():
        return [*_sparse_rows(), *_reduction_rows(), *_more_rows(), *_dense_rows()]


def _half_sums() -> bool:
    """Whether float16 is added up in float16, as MLX's CPU matmul does: then only float32 can be judged."""
    return select.backend().sums_in_half


def _sparse_rows() -> list[dict[str, Any]]:
    rows = []
    for name, case in _cases():
        if _half_sums() and case.dtype != mx.float32:
            continue
        try:
            worst = _worst(case, select.sparse_gemv)
        except RuntimeError as fault:  # MLX's word for a kernel that does not compile or start
            rows.append(_row(name, case, str(fault).strip().splitlines()[0][:60], False))
            continue
        rows.append(_row(name, case, f"{worst.error:.3f}" if worst.error < 1e3 else "inf", worst.passed))
    return rows


def _reduction_rows() -> list[dict[str, Any]]:
    """Launches of a GPU that do more: norms before the product, and reductions that do not just add up."""
    if not select.backend().traces:
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


def _more_rows() -> list[dict[str, Any]]:
    """A GPU's kernels for more than one row, each row over its own channels, in one launch and in stripes."""
    if not select.backend().traces:
        return []
    rows = []
    kind = gpu.device_class()
    for dtype, count in itertools.product((mx.float16, mx.bfloat16, mx.float32), (2, 4, 8, 16, 32, 64)):
        way = "few" if count <= 8 else "matrix"
        if not ways.is_possible(way, count, dtype):
            continue
        case = Case((320,), first_use.INPUTS, bits=3 if count == 4 else 4, dtype=dtype, bias=True)
        layers = matrices(case)
        bands = bands_of(layers)
        cut: geometry.RowsGeometry | geometry.MatrixGeometry
        if way == "few":
            cut = geometry.choose_rows(kind, bands, case.inputs, count, dtype == mx.float32)
        else:
            cut = geometry.choose_matrix(kind, bands, case.inputs, count)
        for stripe in (case.inputs, case.inputs // 2):
            try:
                fault = first_use.rows_fault(dtype, layers, cut._replace(stripe=stripe), dense=False)
            except RuntimeError as error:
                fault = str(error).strip().splitlines()[0]
            name = f"{count} rows{'' if stripe == case.inputs else ', stripes'}, {way}"
            rows.append(_row(name, case, fault[:60] or "within", not fault))
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
    rounded = select.backend().traces and tiny(some)  # MLX's own matmul runs
    found = []
    for active in (0, 1, 0.25, 0.5, 0.75, 1.0):
        x = vector(case, active)
        first, second = sparse_gemv(x, some), sparse_gemv(x, some)
        found.append(accuracy.judge(x, some, first, second, rounded=rounded))
    return accuracy.Judgement(
        max(one.error for one in found), all(one.counts for one in found), all(one.repeated for one in found)
    )


def _many_rows(case: Case, count: int) -> float:
    """The largest error of a matmul of many rows, as a fraction of its bound.

    Kernels for many rows may round weights to x's dtype, multiply as tensor units do (TF32: 10 bits of
    mantissa for float32) and add up blocks in x's dtype: 4 roundings of a term to the coarser of the two.
    """
    (matrix,) = matrices(case)
    x = mx.random.normal((1, count, case.inputs), key=mx.random.key(29)).astype(case.dtype)
    w, sizes = accuracy.reference(matrix)
    exact = accuracy.wide(x)[0] @ w.T + accuracy.wide(matrix.bias)
    size = np.abs(accuracy.wide(x)[0]) @ sizes.T + np.abs(accuracy.wide(matrix.bias))
    bound = 4 * max(accuracy.ROUNDING[case.dtype], 2.0**-11) * size
    return float(np.max(np.abs(accuracy.wide(select.matmul(x, matrix))[0] - exact) / bound))
