"""Checks each GPU kernel variant against a float64 reference before its first use.

A variant is a kernel's text with its constants; shapes are no part of it, so a small problem checks it. The
kernels around a mixture's experts alone have shapes as constants, and are checked for those.
Passes are remembered per chip, system, MLX and spqt version; failures are tried again by each process.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from spqt_cli.backends import accuracy, interface, problems
from spqt_cli.backends.gpu import dequantize, experts, geometry, kernel_text, mixture, rows
from spqt_cli.backends.gpu.launch import Form, Plan, launch, make_plan, per_channel
from spqt_cli.system import files
from spqt_cli.version import __version__

INPUTS = 300  # channels of the problem: several rows and stripes, no multiple of anything
WHOLE_INPUTS = 304  # in halves too a multiple of 16 bytes of x
_refused: dict[str, str] = {}  # why kernels are not used in this process, by what they are
_suspended: list[bool] = []  # one entry for each `suspended` block that is open


def refused() -> list[str]:
    """Why some GPU kernels are not used in this process, in the order in which they failed."""
    return list(_refused.values())


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Kernels run unchecked in this block, wrong ones too: for the self-test, which judges them itself."""
    _suspended.append(True)
    try:
        yield
    finally:
        _suspended.pop()


def verdict(plan: Plan, dtype: mx.Dtype, layers: Sequence[Any], cut: geometry.Geometry) -> str:
    """Why the kernels of these layers' plan must not be used; empty if they are right.

    Each kernel that fails is told in one line, once. Layers that want it do without, by other kernels or by
    MLX's matmul; all other kernels stay in use.
    """
    kernels = [one.kernel for one in (plan.gemv, plan.reduce, plan.counts) if one is not None]
    return _verdict(kernels, lambda: fault(dtype, layers, cut, plan.form))


def rows_verdict(plan: rows.RowsPlan, layers: Sequence[Any], *, dense: bool) -> str:
    """As `verdict`, of the kernels for more than one row."""
    return _verdict(plan.kernels, lambda: rows_fault(plan.dtype, layers, plan.cut, dense=dense))


def whole_verdict(plan: dequantize.WholePlan, dtype: mx.Dtype, layer: Any) -> str:
    """As `verdict`, of the kernel that dequantizes."""
    return _verdict([plan.launch.kernel], lambda: whole_fault(dtype, layer))


def experts_verdict(
    plan: experts.ExpertsPlan, dtype: mx.Dtype, layers: Sequence[Any], cut: geometry.Geometry
) -> str:
    """As `verdict`, of the kernel for chosen experts."""
    return _verdict([plan.launch.kernel], lambda: experts_fault(dtype, layers, cut, plan.pairs))


def mixture_verdict(ends: mixture.Ends, x: mx.array, logits: mx.array) -> str:
    """As `verdict`, of the kernels that choose experts and add up what they give."""
    return _verdict([ends.choose.kernel, ends.add.kernel], lambda: mixture_fault(ends, x, logits))


def _verdict(kernels: Sequence[kernel_text.Kernel], fault_of: Callable[[], str]) -> str:
    if _suspended:
        return ""
    key = _key(kernels)
    if key in _refused or key in _passed():
        return _refused.get(key, "")
    try:
        reason = fault_of()
    except RuntimeError as error:  # MLX's word for a kernel that does not compile or start
        reason = f"a kernel does not run: {str(error).strip().splitlines()[0][:200]}"
    if reason:
        _refused[key] = reason = f"{reason} [{kernels[0].name}]"
        print(f"spqt: {reason}; doing without this kernel; see spqt doctor --selftest", file=sys.stderr)
    else:
        _remember(key)
    return reason


def _small(
    dtype: mx.Dtype, layers: Sequence[Any], band: int, missing: Sequence[int], *, dense: bool
) -> problems.Case:
    """A problem of one band for kernels of these layers. missing: outputs that each is short of the band."""
    return problems.Case(
        tuple(band - few for few in missing),
        INPUTS,
        layers[0].bits,
        layers[0].group_size,
        dtype,
        scales=layers[0].scales.dtype,
        band=band,
        bias=any(layer.get("bias") is not None for layer in layers),
        per_channel=per_channel(layers, dense=dense),
    )


def fault(dtype: mx.Dtype, layers: Sequence[Any], cut: geometry.Geometry, form: Form) -> str:
    """What is wrong with such kernels on a small random problem, run twice; empty if nothing is."""
    one_stripe = cut.stripes(layers[0].weight.shape[1]) == 1
    small = cut._replace(stripe=INPUTS if one_stripe else INPUTS // 2)
    group, then = layers[0].group_size, form.then
    head = then.head if isinstance(then, interface.Rotary) else 1
    step = math.lcm(group, head)
    band = -(-cut.tile // step) * step
    missing = [0 if head > 1 else 3 if then == "glu" else 3 + p for p in range(len(layers))]
    case = _small(dtype, layers, band, missing, dense=form.dense)
    matrices = problems.matrices(case)
    x = multiplied = problems.vector(case)
    if form.norm is not None:
        x, norm, multiplied = problems.before_norm(case)
        form = form._replace(norm=norm)
    if form.dense:
        for matrix in matrices:
            matrix.set_threshold(0.0)
    plan = make_plan(x.shape, dtype, matrices, small, form._replace(then=""))
    first, second = _result(x, plan), _result(x, plan)
    found = accuracy.judge(multiplied, matrices, first, second)
    words = "" if found.passed else found.words()
    if then and not words:
        plan = make_plan(x.shape, dtype, matrices, small, form)
        words = _fault_of_reduction(x, plan, first, then)
    return f"a GPU kernel is wrong on this machine ({words})" if words else ""


def rows_fault(dtype: mx.Dtype, layers: Sequence[Any], cut: rows.Cut, *, dense: bool) -> str:
    """What is wrong with the kernels of such a cut on a small random problem, run twice; empty if nothing is.

    One row more than a threadgroup takes, each with channels of its own. The matrix unit's kernels read x in
    another way where 16 bytes divide it, so they get both.
    """
    few = isinstance(cut, geometry.RowsGeometry)
    one_stripe = cut.stripes(layers[0].weight.shape[1]) == 1
    group = layers[0].group_size
    band = -(-cut.tile // group) * group
    for inputs in (INPUTS,) if few else (INPUTS, WHOLE_INPUTS):
        case = _small(dtype, layers, band, [3 + p for p in range(len(layers))], dense=dense)
        case = dataclasses.replace(case, inputs=inputs)
        matrices = problems.matrices(case)
        if dense:
            for matrix in matrices:
                matrix.set_threshold(0.0)
        x = problems.rows(case, cut.tokens + 1)
        small = cut._replace(stripe=inputs if one_stripe else inputs // 2)
        plan = rows.make_plan(dtype, matrices, small, dense)
        first, second = rows.launch(x, plan), rows.launch(x, plan)
        found = accuracy.judge_rows(x, matrices, first, second, rounded=not few)
        if not found.passed:
            return f"a GPU kernel is wrong on this machine ({found.words()})"
    return ""


def experts_fault(dtype: mx.Dtype, layers: Sequence[Any], cut: geometry.Geometry, pairs: int) -> str:
    """What is wrong with the kernel of such a cut on a small random problem, run twice; empty if nothing is.

    pairs: of the kernel; tried are two rows of x, three or four pairs for each, among three experts of two
    bands.
    """
    dense, group = all(layer.threshold is None for layer in layers), layers[0].group_size
    band = -(-cut.tile // group) * group
    case = _small(dtype, layers, band, [3 + p for p in range(len(layers))], dense=dense)
    case = dataclasses.replace(case, outputs=tuple(band + one for one in case.outputs), bias=False)
    alone, stacks = problems.experts(case, 3)
    if dense:
        for one in (*stacks, *(each for some in alone for each in some)):
            one.set_threshold(0.0)
    x, each = problems.rows(case, 2).reshape(2, INPUTS), 3 if pairs < experts.SMALL else 4
    chosen = [2, 0, 1, 1, 1, 2, 0, 2][: 2 * each]
    plan = experts.make_plan(dtype, stacks, cut._replace(stripe=INPUTS), len(chosen), each)
    results = [experts.launch(x, mx.array(chosen, mx.uint32), plan) for _ in range(2)]
    for pair, expert in enumerate(chosen):
        row = x[pair // each].reshape(1, 1, -1)
        first, second = (([y[pair] for y in ys], active[pair]) for ys, active in results)
        found = accuracy.judge(row, alone[expert], first, second)
        if not found.passed:
            return f"a GPU kernel is wrong on this machine ({found.words()})"
    return ""


def mixture_fault(ends: mixture.Ends, x: mx.array, logits: mx.array) -> str:
    """What is wrong with such kernels on random numbers, two of them equal, run twice; "" if nothing is."""
    keys = mx.random.split(mx.random.key(41), 3)
    numbers = 4 * mx.random.normal((1, 1, logits.shape[-1] - 1), key=keys[0])
    numbers = mx.concatenate([numbers, numbers.max(axis=-1, keepdims=True)], axis=-1).astype(logits.dtype)
    h = mx.random.normal(x.shape, key=keys[1]).astype(x.dtype)
    y = mx.random.normal((*ends.choose.shapes[0], x.shape[-1]), key=keys[2]).astype(x.dtype)
    runs = []
    for _ in range(2):
        indices, weights = mixture.choose(numbers, ends)
        runs.append((indices, weights, mixture.add(h, y, weights, ends)))
    words = accuracy.judge_mixture(numbers, h, y, runs, of_all=ends.of_all)
    return f"a GPU kernel is wrong on this machine ({words})" if words else ""


def whole_fault(dtype: mx.Dtype, layer: Any) -> str:
    """What is wrong with weights dequantized by such a kernel on two small bands; empty if nothing is."""
    group = layer.group_size
    case = dataclasses.replace(_small(dtype, [layer], 3 * group, [0], dense=True), outputs=(6 * group - 3,))
    (matrix,) = problems.matrices(case)
    plan = dequantize.make_plan(dtype, matrix)
    words = accuracy.judge_weights(matrix, dequantize.whole(plan), dequantize.whole(plan))
    return f"a GPU kernel is wrong on this machine ({words})" if words else ""


def _fault_of_reduction(x: mx.array, plan: Plan, apart: accuracy.Result, then: kernel_text.Then) -> str:
    """What is wrong with a reduction that does more than add up, from one that does not."""
    if then == "glu":
        return accuracy.judge_gated(apart, _result(x, plan))
    if isinstance(then, interface.Rotary):
        angles = mx.random.uniform(0.0, 6.0, (then.dims // 2,), key=mx.random.key(37))
        turns = mx.concatenate([mx.cos(angles), mx.sin(angles)])
        return accuracy.judge_rotary(apart, turns, _result(x, plan, turns), then)
    more = mx.random.normal(apart[0][0].shape, key=mx.random.key(31)).astype(x.dtype)
    return accuracy.judge_residual(apart, more, _result(x, plan, more))


def _result(x: mx.array, plan: Plan, other: mx.array | None = None) -> accuracy.Result:
    outputs, active = launch(x, plan, plan.nothing, other)
    assert active is not None
    return outputs, active


def _key(kernels: Sequence[kernel_text.Kernel]) -> str:
    texts = [text for one in kernels for text in (one.name, *kernel_text.metal(one))]
    words = [machine(), kernel_text.body("shim_cuda.h"), *texts]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


@cache
def machine() -> str:
    """Chip, system, MLX and spqt: what a check or a measurement holds for."""
    device = mx.device_info()
    chip = f"{device.get('device_name')} {device.get('architecture')}"
    return f"{chip} {platform.platform()} {metadata.version('mlx')} {__version__}"


def _file() -> Path:
    return files.cache_folder() / "kernels.json"


@cache
def _passed() -> set[str]:
    try:
        return set(json.loads(_file().read_text()))
    except (OSError, ValueError):
        return set()


def _remember(key: str) -> None:
    _passed().add(key)
    store(_file(), sorted(_passed())[-1000:])


def store(path: Path, document: Any) -> None:
    """Keep a JSON document in the cache folder, if that can be written; else it costs time again, no more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(document))
        fresh.replace(path)
