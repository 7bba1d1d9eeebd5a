"""The GPU backend, Metal and CUDA: which launches a step takes.

launch.py, rows.py and dequantize.py plan and launch, geometry.py cuts, kernel_text.py and settings.py hand
constants and numbers to the kernels of metal/, weights.py keeps what belongs to a layer, first_use.py checks
kernels, ways.py times the ways of many rows. Layers are known only as `interface.Projection`s.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import mlx.core as mx

from spqt_cli.backends import stock
from spqt_cli.backends.gpu import (
    compensate,
    dequantize,
    experts,
    first_use,
    geometry,
    rows,
    tiles,
    ways,
    weights,
)
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.launch import Form, Plan, launch
from spqt_cli.backends.interface import (
    Backend,
    Calls,
    Count,
    Experts,
    ExpertsStep,
    FusedCalls,
    GatedStep,
    HeadStep,
    Middle,
    MiddleStep,
    Norm,
    Projection,
    Rotary,
    RotaryStep,
    Step,
    Tail,
    TailStep,
    Total,
    pairs,
)
from spqt_cli.format import layout

MOST_UNFREED = 512 << 20  # bytes of dequantized matrices that wait to be freed
_unfreed: list[int] = []  # bytes of those matrices


def find() -> Backend | str | None:
    """The kernels of this process's GPU; or why they can't run; None if the device is no GPU."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    for name, module, kind in (("metal", mx.metal, "Metal"), ("cuda", mx.cuda, "CUDA")):
        if module.is_available():
            # Counts are handed from step to step by the host, which is the slower of the two here.
            reason, this = f"MLX has a {kind} GPU{_found_out()}", sys.modules[__name__]
            calls, fused = cast(Calls, this), cast(FusedCalls, this)
            rounder = compensate.compensate
            return Backend(
                name,
                reason,
                calls,
                fused=fused,
                count_every=8,
                traces=True,
                skips_experts=True,
                compensate=rounder,
                many_rows=many_rows,
                check=check,
            )
    return "MLX has no GPU here"


def _found_out() -> str:
    """What was timed here, and which kernels this process does without, for the backend's reason."""
    found = "".join(f"; {line}" for line in tiles.report())
    refused = first_use.refused()
    return f"{found}; without {len(refused)} of our kernels: {'; '.join(refused)}" if refused else found


@cache
def device_class() -> str:
    """The kind of device that `geometry.choose` tells apart."""
    if mx.cuda.is_available():
        return "cuda"
    letter = str(mx.device_info().get("architecture", ""))[-1:]  # applegpu_g13s: a Max
    return letter if letter in geometry.THREADGROUPS else "g"


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row, float16, bfloat16 or float32.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels per layer, (n,) uint32.
    """
    plan = _plan(x, layers, Form())
    if plan is None or (plan.gemv is None and len(layers) > 1):
        parts = [sparse_gemv(x, [layer]) for layer in layers]
        return [ys[0] for ys, _ in parts], mx.concatenate([active for _, active in parts])
    if plan.gemv is None:
        return stock.sparse_gemv(x, layers)
    outputs, active = launch(x, plan, plan.nothing)
    assert active is not None
    return outputs, active


def arrange(layers: Sequence[Projection]) -> None:
    """Lay the weights of a launch out as the kernels want them; the layers get other, equal arrays."""
    for some in [layers] if launching.one_launch(layers) else [[layer] for layer in layers]:
        weights.join(some)


def prepare(layers: Sequence[Projection]) -> Step:
    """As `select.prepare`. What one call does is traced once per shape and dtype, then only replayed:
    asking MLX for a custom kernel from Python costs more than the rest of a small layer.
    """
    dense = all(layer.threshold is None for layer in layers)

    @mx.compile
    def step(x: mx.array, counted: Count) -> tuple[list[mx.array], Count]:
        if plan := _usable(x, layers, Form(dense)):
            return launch(x, plan, counted)
        return stock.add_counts(sparse_gemv(x, layers), counted)

    return step


def prepare_gated(x: mx.array, pair: Sequence[Projection], down: Projection) -> GatedStep | None:
    """down(silu(gate) * up) in one traced call, silu in the reduction of gate and up.

    x: such an input as the steps will get. None if the kernels can't: for layers that differ or are small.
    """
    plan = _gated_plan(x, pair, None)
    if plan is None:
        return None
    last = prepare([down])

    @mx.compile
    def step(x: mx.array, counted: Count, counted_down: Count) -> tuple[mx.array, Count, Count]:
        (h,), counted = launch(x, plan, counted)
        (y,), counted_down = last(h, counted_down)
        return y, counted, counted_down

    return step


def prepare_head(norm: Norm, layers: Sequence[Projection]) -> HeadStep:
    """As `select.prepare_head`, in one traced call; the kernel normalizes x itself where it can."""
    products = prepare(layers)
    dense = all(layer.threshold is None for layer in layers)

    @mx.compile
    def step(x: mx.array, counted: Count) -> tuple[mx.array, list[mx.array], Count]:
        normed = mx.fast.rms_norm(x, norm.weight, norm.eps)  # the module's own code may use it as well
        plan = _usable(x, layers, Form(dense, norm=norm))
        return normed, *(products(normed, counted) if plan is None else launch(x, plan, counted))

    return step


def prepare_rotary(
    x: mx.array, norm: Norm, layers: Sequence[Projection], rotary: Rotary
) -> RotaryStep | None:
    """As `select.prepare_rotary`, in one traced call: the reduction of q/k/v applies rotary positions."""
    dense = all(layer.threshold is None for layer in layers)
    plan = _usable(x, layers, Form(dense, rotary, norm)) if launching.turns(layers, rotary) else None
    if plan is None:
        return None

    @mx.compile
    def step(x: mx.array, turns: mx.array, counted: Count) -> tuple[list[mx.array], Count]:
        return launch(x, plan, counted, turns)

    return step


def prepare_tail(x: mx.array, tail: Tail) -> TailStep | None:
    """As `select.prepare_tail`: one traced call; the residual stream is added in the reductions."""
    plan = _gated_plan(x, tail.pair, tail.norm)
    if plan is None:
        return None
    out, down = _residual(tail.out, tail.total), _residual(tail.down, tail.total)

    @mx.compile
    def step(attended: mx.array, x: mx.array, counted: Sequence[Count]) -> tuple[mx.array, list[Count]]:
        h, count = out(attended, x, counted[0])
        (gated,), count_pair = launch(h, plan, counted[1])
        y, count_down = down(gated, h, counted[2])
        return y, [count, count_pair, count_down]

    return step


def prepare_middle(x: mx.array, middle: Middle) -> MiddleStep:
    """As `select.prepare_middle`: one traced call; the residual stream is added in the reduction."""
    out = _residual(middle.out, None)

    @mx.compile
    def step(
        attended: mx.array, x: mx.array, counted: Sequence[Count]
    ) -> tuple[tuple[mx.array, mx.array], list[Count]]:
        h, count = out(attended, x, counted[0])
        return (h, mx.fast.rms_norm(h, middle.norm.weight, middle.norm.eps)), [count]

    return step


def prepare_experts(layers: Sequence[Experts]) -> ExpertsStep:
    """As `select.prepare_experts`, traced as `prepare` is; by MLX's own kernel where ours can't."""
    whole = stock.prepare_experts(layers)

    @mx.compile
    def step(x: mx.array, indices: mx.array, counted: Count) -> tuple[list[mx.array], Count]:
        plan = _experts_plan(x, indices, layers)
        if plan is None:
            return whole(x, indices, counted)
        if x.shape[:-2] != (*indices.shape[:-1], 1):
            x, indices = stock.spread(x, indices)
        products, active = experts.launch(x, indices, plan)
        outputs = [y.reshape(*indices.shape, 1, y.shape[-1]) for y in products]
        for at, layer in enumerate(layers):
            if (bias := layer.get("bias")) is not None:
                outputs[at] += mx.expand_dims(bias[indices], -2).astype(x.dtype)
        return outputs, None if counted is None else counted + active.sum(axis=0)

    return step


def _experts_plan(x: mx.array, indices: mx.array, layers: Sequence[Experts]) -> experts.ExpertsPlan | None:
    """The plan of a call, made once; None if the kernel can't take these layers, or failed its check."""
    each = indices.shape[-1] if x.shape[:-2] == (*indices.shape[:-1], 1) else 1
    count = pairs(x, indices)
    plans = weights.kept(layers[0]).plans
    key = ("experts", count, each, x.dtype, *map(id, layers))
    if key in plans:
        known: experts.ExpertsPlan | None = plans[key]
        if known is None or known.still_fits(layers):
            return known
    plan = None
    if launching.one_launch(layers) and not launching.tiny(layers):
        for cut in _decodings(choose_experts(layers, x.dtype, count)):
            made = experts.make_plan(x.dtype, layers, cut, count, each)
            if not first_use.experts_verdict(made, x.dtype, layers, cut):
                plan = made
                break
    plans[key] = plan
    return plan


def experts_matmul(x: mx.array, indices: mx.array, layer: Experts, sorted_indices: bool) -> mx.array:
    """As `select.experts_matmul`."""
    return stock.experts_matmul(x, indices, layer, sorted_indices)


def _gated_plan(x: mx.array, pair: Sequence[Projection], norm: Norm | None) -> Plan | None:
    """The plan for silu(gate) * up, of x or of its norm; None if the kernels can't."""
    dense = all(layer.threshold is None for layer in pair)
    shapes = {(layer.outputs, *bands) for layer, bands in zip(pair, launching.bands(pair), strict=True)}
    return _usable(x, pair, Form(dense, "glu", norm)) if len(shapes) == 1 else None


def _usable(x: mx.array, layers: Sequence[Projection], form: Form) -> Plan | None:
    """The plan of a call; None if the kernels can't."""
    if form.norm is not None and form.norm.weight.dtype != x.dtype:
        return None  # MLX would go on in the wider of the two
    plan = _plan(x, layers, form)
    return None if plan is None or plan.gemv is None else plan


def _residual(layer: Projection, total: Total | None) -> Callable[..., tuple[mx.array, Count]]:
    """layer(x) + residual, and the count, as one call of a trace.

    Of a part of the layer's inputs the first process adds the residual to its own product, and then all of
    them add those up.
    """
    products = prepare([layer])

    def step(x: mx.array, residual: mx.array, counted: Count) -> tuple[mx.array, Count]:
        if total is None:
            return added(x, residual, counted)
        if total.is_first:
            y, counted = added(x, residual, counted)
        else:
            (y,), counted = products(x, counted)
        return total.all(y), counted

    def added(x: mx.array, residual: mx.array, counted: Count) -> tuple[mx.array, Count]:
        plan = _usable(x, [layer], Form(layer.threshold is None, "residual"))
        if plan is None:
            (y,), counted = products(x, counted)
            return y + residual, counted
        (y,), counted = launch(x, plan, counted, residual)
        return y, counted

    return step


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """x @ W.T + bias with all channels: x (..., inputs) -> (..., outputs); lazy."""
    rows = x.size // x.shape[-1]
    if rows == 1:
        plan = _usable(x, [layer], Form(dense=True))
        return stock.matmul(x, layer) if plan is None else launch(x, plan)[0][0]
    return WAYS[ways.best(rows, layer, x.dtype, WAYS)](x, layer)


def sparse_rows(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """A few rows through several projections of one input, each over its own active channels; lazy.

    x: (..., inputs) of 2 to 64 rows, float16, bfloat16 or float32. A layer without threshold runs dense.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels, (layers, rows) uint32.
    """
    if not launching.one_launch(layers):
        parts = [sparse_rows(x, [layer]) for layer in layers]
        return [ys[0] for ys, _ in parts], mx.concatenate([active for _, active in parts])
    count = x.size // x.shape[-1]
    way = ways.best(count, layers[0], x.dtype, WAYS)
    dense = all(layer.threshold is None for layer in layers)
    if way == "few" and (plan := _rows_plan("few", x, layers, dense)):
        return rows.launch(x, plan)
    plans = [_rows_plan("matrix", x, [layer], dense) if way == "matrix" else None for layer in layers]
    found = [
        _masked_rows(x, layer, way) if plan is None else rows.launch(x, plan)
        for layer, plan in zip(layers, plans, strict=True)
    ]
    return [ys[0] for ys, _ in found], mx.concatenate([active for _, active in found])


def _masked_rows(x: mx.array, layer: Projection, way: str) -> tuple[list[mx.array], mx.array]:
    """As `sparse_rows`, of one projection: x masked first, then all weights."""
    masked = x if layer.threshold is None else layout.mask(x, layer.threshold)
    return [WAYS[way](masked, layer)], stock.active_rows(x.reshape(-1, x.shape[-1]), layer)[None]


def many_rows() -> list[str]:
    """How many rows are multiplied on this device, a line for each kind of layer; timed now if nobody did."""
    if not ways.report():
        ways.choice_for(ways.Kind(mx.bfloat16, 4, 64), WAYS)
    return ways.report()


def check(groups: Sequence[Sequence[Projection]]) -> list[str]:
    """As `Backend.check`. On CUDA kernels for more rows than one wait for their first use: each takes over a
    second to compile.
    """
    seen = set()
    for layers in groups:
        kind = tuple(map(_kind, layers))
        if kind in seen or layers[0].weight.ndim > 3:  # experts are checked by the step that runs them
            continue
        seen.add(kind)
        dtype, inputs = layers[0].scales.dtype, layers[0].weight.shape[-2]
        for form in (Form(), Form(dense=True)):
            _plan(mx.zeros((1, 1, inputs), dtype), layers, form)
        for layer in layers:
            _plan(mx.zeros((1, 1, inputs), dtype), [layer], Form(dense=True))  # a prompt of one token
        if mx.cuda.is_available():
            continue
        for count in range(2, ways.MOST_FEW + 1):
            x = mx.zeros((1, count, inputs), dtype)
            if launching.one_launch(layers):
                _rows_plan("few", x, layers, dense=all(layer.threshold is None for layer in layers))
            for layer in layers:
                _rows_plan("few", x, [layer], dense=True)
        for layer in layers:
            _whole_plan(dtype, layer)
    return first_use.refused()


def _kind(layer: Projection) -> tuple[object, ...]:
    """All that decides which kernels a layer takes."""
    threshold, bias = layer.threshold, layer.get("bias")
    return (
        layer.weight.shape,
        layer.outputs,
        layer.bits,
        layer.group_size,
        layer.scales.dtype,
        None if threshold is None else threshold.size,
        bias is None,
    )


def _few(x: mx.array, layer: Projection) -> mx.array:
    plan = _rows_plan("few", x, [layer], dense=True)
    return stock.matmul(x, layer) if plan is None else rows.launch(x, plan)[0][0]


def _matrix(x: mx.array, layer: Projection) -> mx.array:
    plan = _rows_plan("matrix", x, [layer], dense=True)
    return _dequantized_matmul(x, layer) if plan is None else rows.launch(x, plan)[0][0]


def _rows_plan(way: str, x: mx.array, layers: Sequence[Projection], dense: bool) -> rows.RowsPlan | None:
    """The plan for so many rows, made once; None if the kernels can't."""
    count = x.size // x.shape[-1]
    alike = count if count <= 64 else -(-count // 64) * 64  # rows that are cut alike
    plans = weights.kept(layers[0]).plans
    key = (way, alike, x.dtype, dense, *map(id, layers))
    if key in plans:
        known: rows.RowsPlan | None = plans[key]
        if known is None or known.still_fits(layers):
            return known
    plan = _checked_rows(way, x, layers, alike, dense)
    plans[key] = plan
    return plan


def _checked_rows(
    way: str, x: mx.array, layers: Sequence[Projection], count: int, dense: bool
) -> rows.RowsPlan | None:
    """A plan whose kernels were checked, shared by counts that are cut alike; None where they failed."""
    if launching.tiny(layers):
        return None
    bands, inputs = launching.bands(layers), x.shape[-1]
    cut: rows.Cut
    if way == "matrix":
        cut = geometry.choose_matrix(device_class(), bands, inputs, count, layers[0].bits)
    else:
        cut = geometry.choose_rows(device_class(), bands, inputs, count, x.dtype == mx.float32)
    plans = weights.kept(layers[0]).plans
    key = (cut, x.dtype, dense, *map(id, layers))
    known: rows.RowsPlan | None = plans.get(key)
    if known is not None and known.still_fits(layers):
        return known
    plan = rows.make_plan(x.dtype, layers, cut, dense)  # joins arrays, after which older plans are gone
    if first_use.rows_verdict(plan, layers, dense=dense):
        return None
    weights.kept(layers[0]).plans[key] = plan
    return plan


def _dequantized_matmul(x: mx.array, layer: Projection) -> mx.array:
    """As `matmul`, the matrix dequantized once and multiplied as a dense one."""
    plan = _whole_plan(x.dtype, layer)
    if plan is None:
        w = mx.dequantize(
            layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits
        )
        w = w.swapaxes(0, 1).reshape(x.shape[-1], -1).astype(x.dtype)
    else:
        w = dequantize.whole(plan)
    y = x.reshape(-1, x.shape[-1]) @ w
    y = y[:, : layer.outputs].reshape(*x.shape[:-1], layer.outputs)
    _free_in_time(y, w.nbytes)
    bias = layer.get("bias")
    return y if bias is None else y + bias


def _whole_plan(dtype: mx.Dtype, layer: Projection) -> dequantize.WholePlan | None:
    """The plan for the layer's weights in this dtype, made once; None if the kernel can't."""
    key = ("whole", dtype)
    plans = weights.kept(layer).plans
    if key in plans:
        known: dequantize.WholePlan | None = plans[key]
        if known is None or known.still_fits(layer):
            return known
    plan = None
    if not launching.tiny([layer]):
        made = dequantize.make_plan(dtype, layer)  # may join arrays, after which older plans are gone
        plan = None if first_use.whole_verdict(made, dtype, layer) else made
    plans[key] = plan
    return plan


def matmul_transposed(y: mx.array, layer: Projection) -> mx.array:
    """As `select.matmul_transposed`, by MLX's own kernel: training alone asks for it."""
    return stock.matmul_transposed(y, layer)


def _free_in_time(y: mx.array, size: int) -> None:
    """Evaluate y when the matrices dequantized since the last time are many bytes.

    MLX frees temporaries once some hundred operations have run, which would keep several blocks' matrices.
    """
    _unfreed.append(size)
    if sum(_unfreed) > MOST_UNFREED:
        _unfreed.clear()
        with contextlib.suppress(ValueError):  # within mx.compile or mx.grad nothing can be evaluated
            mx.eval(y)


def _plan(x: mx.array, layers: Sequence[Projection], form: Form) -> Plan | None:
    """The plan of a call, made once; None if the layers can't share a launch."""
    plans = weights.kept(layers[0]).plans
    norm = (id(form.norm.weight), form.norm.eps) if form.norm else None
    key = (x.shape, x.dtype, form.dense, form.then, norm, *map(id, layers))
    if key in plans:
        known: Plan | None = plans[key]
        if known is None or known.still_fits(layers):
            return known
    plan = _checked(x, layers, form) if launching.one_launch(layers) else None
    plans[key] = plan
    return plan


def _checked(x: mx.array, layers: Sequence[Projection], form: Form) -> Plan:
    """A plan whose kernels were checked; without launches where they failed or can't take the arrays."""
    for cut in _decodings(choose(layers, x.dtype)):
        plan = launching.make_plan(x.shape, x.dtype, layers, cut, form)
        if plan.gemv is None or launching.tiny(layers, form):
            break
        if not first_use.verdict(plan, x.dtype, layers, cut):
            return plan
    return plan._replace(gemv=None)


def choose(layers: Sequence[Projection], dtype: mx.Dtype) -> geometry.Geometry:
    """The launch geometry of these projections on this device, for an x of this dtype."""
    first, precise = layers[0], dtype == mx.float32
    kind = ways.Kind(dtype, first.bits, first.group_size)
    tile = "" if precise else tiles.best(device_class(), kind, _product_by)
    cut = geometry.choose(device_class(), launching.bands(layers), first.weight.shape[1], precise, tile)
    return _decodings(cut)[0]


def _product_by(x: mx.array, layer: Projection, tile: str) -> tiles.Product:
    """The sparse product of a layer in such tiles, for x of this shape; the kernels are not checked."""
    bands, inputs = launching.bands([layer]), layer.weight.shape[1]
    cut = _decodings(geometry.choose(device_class(), bands, inputs, False, tile))[0]
    plan = launching.make_plan(x.shape, x.dtype, [layer], cut, Form())
    return lambda row: launch(row, plan)[0][0]


def choose_experts(layers: Sequence[Projection], dtype: mx.Dtype, pairs: int) -> geometry.Geometry:
    """As `choose`, for experts and so many pairs of a row and an expert."""
    bands, inputs = launching.bands(layers), layers[0].weight.shape[-2]
    cut = geometry.choose_experts(device_class(), bands, inputs, pairs, dtype == mx.float32)
    return _decodings(cut)[0]


def _decodings(cut: geometry.Geometry) -> list[geometry.Geometry]:
    """The cut, then the same with converted codes: for GPUs that don't read them as subnormal halves."""
    if cut.decode != geometry.HALVES:
        return [cut]
    converted = cut._replace(decode=geometry.CONVERT)
    return [cut, converted] if keeps_subnormal_halves() else [converted]


@cache
def keeps_subnormal_halves() -> bool:
    """Whether this device turns subnormal numbers of 16 bits into floats, which Metal leaves to it."""
    five = mx.array([5], mx.uint16).view(mx.float16)  # 5 times 2^-24
    return bool((five.astype(mx.float32) * 2.0**24 == 5.0).item())


WAYS: dict[str, ways.Call] = {
    "few": _few,
    "matrix": _matrix,
    "quantized": stock.matmul,
    "dequantized": _dequantized_matmul,
}
