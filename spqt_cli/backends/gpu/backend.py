"""The GPU backend, Metal and CUDA: which launches a step takes.

plans.py decides on launches, many.py on products of several rows; launch.py, rows.py and dequantize.py make
plans and launch, geometry.py cuts, kernel_text.py and settings.py hand constants and numbers to the kernels
of metal/, weights.py keeps what belongs to a layer, first_use.py checks kernels, ways.py times the ways of
many rows. Layers are known only as `interface.Projection`s.
"""

import sys
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from spqt_cli.backends import stock
from spqt_cli.backends.gpu import (
    compensate,
    experts,
    first_use,
    many,
    mixture,
    plans,
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
    Mixture,
    MixtureStep,
    Norm,
    Projection,
    Rotary,
    RotaryStep,
    Step,
    Tail,
    TailStep,
    Total,
)

matmul, sparse_rows = many.matmul, many.sparse_rows  # a backend has these as well


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
                many_rows=many.many_rows,
                check=check,
            )
    return "MLX has no GPU here"


def _found_out() -> str:
    """What was timed here, and which kernels this process does without, for the backend's reason."""
    found = "".join(f"; {line}" for line in tiles.report())
    refused = first_use.refused()
    return f"{found}; without {len(refused)} of our kernels: {'; '.join(refused)}" if refused else found


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row, float16, bfloat16 or float32.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels per layer, (n,) uint32.
    """
    plan = plans.of_row(x, layers, Form())
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
        if plan := plans.usable(x, layers, Form(dense)):
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
        plan = plans.usable(x, layers, Form(dense, norm=norm))
        return normed, *(products(normed, counted) if plan is None else launch(x, plan, counted))

    return step


def prepare_rotary(
    x: mx.array, norm: Norm, layers: Sequence[Projection], rotary: Rotary
) -> RotaryStep | None:
    """As `select.prepare_rotary`, in one traced call: the reduction of q/k/v applies rotary positions."""
    dense = all(layer.threshold is None for layer in layers)
    plan = plans.usable(x, layers, Form(dense, rotary, norm)) if launching.turns(layers, rotary) else None
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


def prepare_mixture(x: mx.array, wanted: Mixture) -> MixtureStep | None:
    """As `select.prepare_mixture`, in one traced call: experts.py's launches between a choice and a sum."""
    if any(layer.get("bias") is not None for layer in (*wanted.pair, wanted.down)):
        return None
    logits, middle = wanted.router(x), wanted.down.weight.shape[-2]
    ends = mixture.ends(x, logits, wanted.chosen, of_all=wanted.of_all)
    if ends is None or first_use.mixture_verdict(ends, x, logits):
        return None
    indices = mx.zeros((wanted.chosen,), mx.uint32)
    of_pair = plans.of_experts(x.reshape(1, 1, -1), indices, wanted.pair)
    of_down = plans.of_experts(mx.zeros((len(indices), 1, middle), x.dtype), indices, [wanted.down])
    if of_pair is None or of_down is None:
        return None

    @mx.compile
    def step(h: mx.array, normed: mx.array, counted: Sequence[Count]) -> tuple[mx.array, list[Count]]:
        indices, weights = mixture.choose(wanted.router(normed), ends)
        (gate, up), active = experts.launch(normed, indices, of_pair)
        (y,), active_down = experts.launch(gate * mx.sigmoid(gate) * up, indices, of_down)
        counts = [
            None if before is None else before + here.sum(axis=0)
            for before, here in zip(counted, (active, active_down), strict=True)
        ]
        return mixture.add(h, y, weights, ends), counts

    return step


def prepare_experts(layers: Sequence[Experts]) -> ExpertsStep:
    """As `select.prepare_experts`, traced as `prepare` is; by MLX's own kernel where ours can't."""
    whole = stock.prepare_experts(layers)

    @mx.compile
    def step(x: mx.array, indices: mx.array, counted: Count) -> tuple[list[mx.array], Count]:
        plan = plans.of_experts(x, indices, layers)
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


def experts_matmul(x: mx.array, indices: mx.array, layer: Experts, sorted_indices: bool) -> mx.array:
    """As `select.experts_matmul`."""
    return stock.experts_matmul(x, indices, layer, sorted_indices)


def _gated_plan(x: mx.array, pair: Sequence[Projection], norm: Norm | None) -> Plan | None:
    """The plan for silu(gate) * up, of x or of its norm; None if the kernels can't."""
    dense = all(layer.threshold is None for layer in pair)
    shapes = {(layer.outputs, *bands) for layer, bands in zip(pair, launching.bands(pair), strict=True)}
    return plans.usable(x, pair, Form(dense, "glu", norm)) if len(shapes) == 1 else None


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
        plan = plans.usable(x, [layer], Form(layer.threshold is None, "residual"))
        if plan is None:
            (y,), counted = products(x, counted)
            return y + residual, counted
        (y,), counted = launch(x, plan, counted, residual)
        return y, counted

    return step


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
            plans.of_row(mx.zeros((1, 1, inputs), dtype), layers, form)
        for layer in layers:
            plans.of_row(mx.zeros((1, 1, inputs), dtype), [layer], Form(dense=True))  # a prompt of one token
        if mx.cuda.is_available():
            continue
        for count in range(2, ways.MOST_FEW + 1):
            x = mx.zeros((1, count, inputs), dtype)
            if launching.one_launch(layers):
                plans.of_rows("few", x, layers, dense=all(layer.threshold is None for layer in layers))
            for layer in layers:
                plans.of_rows("few", x, [layer], dense=True)
        for layer in layers:
            plans.of_matrix(dtype, layer)
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


def matmul_transposed(y: mx.array, layer: Projection) -> mx.array:
    """As `select.matmul_transposed`, by MLX's own kernel: training alone asks for it."""
    return stock.matmul_transposed(y, layer)
