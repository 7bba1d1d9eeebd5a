"""Runs a backend's kernels on random problems against the definition in float64: `spqt doctor --selftest`.

problems.py makes the problems, accuracy.py says how far results may lie from the reference.
"""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends import accuracy, select
from spqt_cli.backends.gpu import first_use, geometry, many, mixture, plans, ways
from spqt_cli.backends.gpu.launch import Form, tiny
from spqt_cli.backends.gpu.launch import bands as bands_of
from spqt_cli.backends.interface import Norm, Rotary
from spqt_cli.backends.problems import Case, matrices, vector
from spqt_cli.errors import BackendError
from spqt_cli.format import layout

Row = dict[str, Any]  # of the table
Check = Callable[[], Row]
MOST_WORKERS = 8


def run() -> Iterator[Row]:
    """Rows of the table, each when it is done: kernel, shape, bits, group, dtype, worst error, pass.

    worst error: as a fraction of the bound. GPU kernels run here whatever an earlier check of them said.
    CUDA's compiler takes more than a second for each of more than a hundred kernels, nearly all of it for
    MLX's headers, so several processes share them.
    """
    checks = _checks()
    workers = min(MOST_WORKERS, (os.cpu_count() or 1) // 2) if mx.cuda.is_available() else 1
    if workers <= 1:
        yield from map(_judged, checks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(_numbered, range(len(checks)))
        except BrokenProcessPool as error:
            raise BackendError(
                "a process of the self-test died on the GPU", "free the GPU and its memory, and try again"
            ) from error


def _checks() -> list[Check]:
    return [
        *_sparse_checks(),
        *_reduction_checks(),
        *_experts_checks(),
        *_more_rows_checks(),
        *_dense_checks(),
    ]


def _numbered(number: int) -> Row:
    """One of the checks, in a process of its own."""
    return _judged(_checks()[number])


def _judged(check: Check) -> Row:
    with first_use.suspended():
        return check()


def _half_sums() -> bool:
    """Whether float16 is added up in float16, as MLX's CPU matmul does: then only float32 can be judged."""
    return select.backend().sums_in_half


def _sparse_checks() -> Iterator[Check]:
    for name, case in _cases():
        if not _half_sums() or case.dtype == mx.float32:
            yield partial(_sparse, name, case)


def _sparse(name: str, case: Case) -> Row:
    try:
        worst = _worst(case, select.sparse_gemv)
    except RuntimeError as fault:  # MLX's word for a kernel that does not compile or start
        return _row(name, case, _first_line(fault), False)
    return _row(name, case, f"{worst.error:.3f}" if worst.error < 1e3 else "inf", worst.passed)


def _reduction_checks() -> Iterator[Check]:
    """Launches of a GPU that do more: norms before the product, and reductions that do not just add up."""
    if not select.backend().traces:
        return
    turned = Rotary(64, 48, traditional=False, rotated=2)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        norm = Norm(mx.ones((first_use.INPUTS,), dtype), 1e-5)
        kinds = [
            ("silu(gate) * up", Form(then="glu", norm=norm), (320, 320)),
            ("residual", Form(then="residual"), (320,)),
            ("turned heads", Form(then=turned, norm=norm), (320, 64, 64)),
        ]
        for name, form, outputs in kinds:
            yield partial(_reduction, name, Case(outputs, first_use.INPUTS, dtype=dtype), form)


def _reduction(name: str, case: Case, form: Form) -> Row:
    layers = matrices(case)
    cut = plans.choose(layers, case.dtype)._replace(stripe=first_use.INPUTS // 2)
    return _fault_row(name, case, "equal", lambda: first_use.fault(case.dtype, layers, cut, form))


def _more_rows_checks() -> Iterator[Check]:
    """A GPU's kernels for more than one row, each row over its own channels, in one launch and in stripes."""
    if not select.backend().traces:
        return
    dtypes = (mx.float16, mx.bfloat16, mx.float32)
    for dtype, (way, counts) in itertools.product(dtypes, ROWS.items()):
        for count in counts:
            case = Case((320,), first_use.INPUTS, bits=3 if count == 4 else 4, dtype=dtype, bias=True)
            if ways.is_possible(way, count, dtype):
                for stripe in (case.inputs, case.inputs // 2):
                    yield partial(_more_rows, way, count, case, stripe)


def _experts_checks() -> Iterator[Check]:
    """A GPU's kernel for the experts that were chosen for each row."""
    if not select.backend().traces:
        return
    dtypes = (mx.float16, mx.bfloat16, mx.float32)
    for dtype, outputs, pairs in itertools.product(dtypes, ((320,), (320, 320)), (6, 8)):
        yield partial(_experts, Case(outputs, first_use.INPUTS, dtype=dtype), pairs)
    for dtype, chosen in itertools.product(dtypes, (2, 8)):
        yield partial(_mixture, Case((320,), first_use.INPUTS, dtype=dtype), chosen)


def _mixture(case: Case, chosen: int) -> Row:
    """The kernels that choose experts, and that add up what they give."""
    x, logits = mx.zeros((1, 1, case.inputs), case.dtype), mx.zeros((1, 1, 60), case.dtype)
    ends = mixture.ends(x, logits, chosen, of_all=chosen == 2)
    assert ends is not None
    return _fault_row(
        f"{chosen} of 60 experts", case, "within", lambda: first_use.mixture_fault(ends, x, logits)
    )


def _experts(case: Case, pairs: int) -> Row:
    layers = matrices(case)
    cut = plans.choose_experts(layers, case.dtype, pairs)
    judge = partial(first_use.experts_fault, case.dtype, layers, cut, pairs)
    return _fault_row(f"chosen experts, {pairs} pairs", case, "within", judge)


ROWS = {"few": (2, 4, 8), "matrix": (8, 16, 32, 64, 128)}  # one count for each kernel


def _more_rows(way: str, count: int, case: Case, stripe: int) -> Row:
    layers = matrices(case)
    bands, kind = bands_of(layers), plans.device_class()
    cut: geometry.RowsGeometry | geometry.MatrixGeometry | geometry.GemmGeometry
    if way == "few":
        cut = geometry.choose_rows(kind, bands, case.inputs, count, case.dtype == mx.float32)
    else:
        cut = geometry.choose_matrix(kind, bands, case.inputs, count, case.bits)
    cut = cut._replace(stripe=stripe)
    name = f"{count} rows{'' if stripe == case.inputs else ', stripes'}, {way}"
    return _fault_row(
        name, case, "within", lambda: first_use.rows_fault(case.dtype, layers, cut, dense=False)
    )


def _dense_checks() -> Iterator[Check]:
    """All channels: one row; and more by each way that there is, or the backend's only one."""
    dtypes = (mx.float32,) if _half_sums() else (mx.float32, mx.float16, mx.bfloat16)
    for count, dtype in itertools.product((1, 3, 40), dtypes):
        case = Case((1000,), 777, dtype=dtype, bias=True)
        name = f"{count} dense row{'s' * (count > 1)}"
        if count == 1 or not select.backend().traces:
            yield partial(_dense, name, case, count, select.matmul)
            continue
        for way, call in many.WAYS.items():
            if ways.is_possible(way, count, dtype):
                yield partial(_dense, f"{name}, {way}", case, count, call)


def _dense(name: str, case: Case, count: int, call: ways.Call) -> Row:
    try:
        share = _many_rows(case, count, call)
    except RuntimeError as fault:
        return _row(name, case, _first_line(fault), False)
    return _row(name, case, f"{share:.3f}", share <= 1.0)


def _fault_row(name: str, case: Case, right: str, judge: Callable[[], str]) -> Row:
    try:
        fault = judge()
    except RuntimeError as error:
        fault = _first_line(error)
    return _row(name, case, fault[:60] or right, not fault)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:60]


def _row(name: str, case: Case, error: str, passed: bool) -> Row:
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


def _many_rows(case: Case, count: int, call: ways.Call) -> float:
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
    return float(np.max(np.abs(accuracy.wide(call(x, matrix))[0] - exact) / bound))
