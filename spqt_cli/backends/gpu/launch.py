"""Plans and launches of the GPU kernels: from layers, a shape and a geometry to MLX's calls.

A plan holds all that a call can reuse. backend.py says which plans a step takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from spqt_cli.backends.gpu import geometry, kernel_text, weights
from spqt_cli.backends.gpu.kernel_text import COUNTS, Constants, Kernel, Rotary, Then
from spqt_cli.backends.gpu.settings import BOTH, LaunchSettings, ProjectionSettings, pack
from spqt_cli.backends.interface import Count, Norm, Projection

MAX_SHARED = 6  # projections in one launch; Metal binds at most 31 buffers, this takes P + 5
Array = TypeVar("Array", mx.array, mx.array | None)
TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


class Form(NamedTuple):
    """What a call computes besides its layers' products.

    dense: all channels are used, whatever the thresholds. then: "glu" gives silu(first) * second of two
    layers, "residual" y plus another array, a Rotary y with rotary positions, (1, heads, 1, width) each.
    norm: applied to x first; its weight has x's dtype.
    """

    dense: bool = False
    then: Then = ""
    norm: Norm | None = None


@dataclass(eq=False)
class Launch:
    """One call of a kernel, all but its inputs; depends on shapes only."""

    kernel: Kernel
    threadgroups: tuple[int, int]
    shapes: Sequence[tuple[int, ...]]
    dtypes: list[mx.Dtype]
    built: Callable[..., list[mx.array]] | None = None


class Plan(NamedTuple):
    """All that a call can reuse: what depends on the layers and on x's shape and dtype."""

    known: tuple[tuple[mx.array, mx.array | None], ...]  # each layer's weight and threshold
    form: Form  # its norm is kept: a plan is found by the identity of its arrays
    inputs: list[mx.array]  # settings and packed weights
    nothing: mx.array  # (layers,) uint32 zeros: the counts to begin with
    gemv: Launch | None  # None where MLX's own matmul is to run: see backend.py
    reduce: Launch | None
    counts: Launch | None  # with `reduce`

    def still_fits(self, layers: Sequence[Any]) -> bool:
        """Whether these layers have the arrays that they had when the plan was made."""
        pairs = zip(layers, self.known, strict=True)
        return all(
            layer.get("weight") is weight and layer.threshold is threshold
            for layer, (weight, threshold) in pairs
        )

    def first_inputs(self, x: mx.array, counted: mx.array | None = None) -> list[mx.array]:
        """The arrays of the first launch; where it is the only one it takes the counts so far."""
        before = [] if self.reduce else [self.nothing if counted is None else counted]
        return [x, *self.inputs, *before]


def launch(
    x: mx.array, plan: Plan, counted: Count = None, other: mx.array | None = None
) -> tuple[list[mx.array], Count]:
    """The outputs of a plan's one or two kernel calls, and `counted` plus the active channels; lazy.

    Counting partial sums takes a call of its own, left out if nothing is counted.
    other: what the reduction takes with the sums: the residual stream, or a position's cosines and sines.
    """
    assert plan.gemv is not None
    x, counted, other = in_rows(x), in_rows(counted), in_rows(other)
    *outputs, last = run(plan.gemv, plan.first_inputs(x, counted))
    if plan.reduce is None or plan.counts is None:
        return outputs, last
    sums = [last, plan.inputs[0]]
    outputs = run(plan.reduce, sums if other is None else [*sums, other])
    if counted is None:
        return outputs, None
    (active,) = run(plan.counts, [*sums, counted])
    # A count that nobody has read yet holds on to the sums; y depends on it, so that it runs with y.
    return mx.depends(outputs, [active]), active


def in_rows(array: Array) -> Array:
    """The array as the kernels index it, its elements in rows; None stays None.

    Everything that others computed goes through here. MLX can copy a strided input of a custom kernel itself,
    but on Metal it may free that copy while the GPU still reads it (mlx issue 3347): there it is told not to,
    and the copy is an operation of the graph. On CUDA its own copies live long enough and cost less.
    """
    return mx.contiguous(array) if array is not None and mx.metal.is_available() else array


def run(launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """The outputs of one kernel call; lazy. inputs: in rows."""
    if launch.built is None:
        launch.built = _built(launch.kernel)
    x, y = launch.threadgroups
    threads = launch.kernel.threads
    return launch.built(
        inputs=inputs,
        grid=(x * threads, y, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )


@cache
def _built(kernel: Kernel) -> Callable[..., list[mx.array]]:
    metal = mx.metal.is_available()
    make: Any = mx.fast.metal_kernel if metal else mx.fast.cuda_kernel
    source, head = kernel_text.metal(kernel) if metal else kernel_text.cuda(kernel)
    return make(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source,
        header=head,
        ensure_row_contiguous=not metal,  # see `in_rows`
    )


def one_launch(layers: Sequence[Projection]) -> bool:
    """Whether these projections can share a launch: equal in all that the kernel has as constants."""
    kinds = {(layer.bits, layer.group_size, layer.scales.dtype) for layer in layers}
    return len(kinds) == 1 and len(layers) <= MAX_SHARED


def tiny(layers: Sequence[Projection], form: Form | None = None) -> bool:
    """Whether MLX would pass an array, under eight elements, in another address space: not worth a kernel."""
    sizes = [array.size for one in layers for array in (one.weight, one.scales, one.biases)]
    sizes.append(layers[0].weight.shape[-2])  # x
    if form and form.then == "residual":
        sizes.append(layers[0].outputs)
    return min(sizes) < 8


def make_plan(
    shape: tuple[int, ...], dtype: mx.Dtype, layers: Sequence[Any], cut: geometry.Geometry, form: Form
) -> Plan:
    """The launches and the settings array for these layers and an x of this shape and dtype.

    No launches where something is to follow the sums, and there are no stripes to add up.
    """
    joined = weights.join(layers)
    stripes = cut.stripes(shape[-1])
    tiles = sum(cut.tiles(band) * number for band, number in bands(layers))
    settings = settings_of(layers, joined, cut, form.dense, form.norm)
    constants = constants_of(dtype, layers, cut, form)
    y_shapes = [_y_shape(shape, layer.outputs, form.then) for layer in layers]
    nothing = mx.zeros(len(layers), mx.uint32)
    known = tuple((layer.weight, layer.threshold) for layer in layers)
    plan = Plan(known, form, [settings, joined[0].words], nothing, None, None, None)
    mx.eval(nothing)
    results = y_shapes[:1] if form.then == "glu" else y_shapes
    dtypes = [dtype] * len(results)
    if stripes == 1 and form.then:
        return plan
    if stripes == 1:
        kernel = kernel_text.gemv_kernel(constants, cut.threads, partial=False)
        shapes = [*results, (len(layers),)]
        return plan._replace(gemv=Launch(kernel, (tiles, 1), shapes, [*dtypes, mx.uint32]))
    positions = tiles * cut.tile
    partials = (stripes, positions + COUNTS)
    kernel = kernel_text.gemv_kernel(constants, cut.threads, partial=True)
    gemv = Launch(kernel, (tiles, stripes), [partials], [mx.float32])
    grid = (positions // geometry.SIMD // (2 if form.then == "glu" else 1), 1)
    reduce = Launch(kernel_text.reduce_kernel(constants, form.then), grid, results, dtypes)
    counts = Launch(kernel_text.count_kernel(), (1, 1), [(len(layers),)], [mx.uint32])
    return plan._replace(gemv=gemv, reduce=reduce, counts=counts)


def _y_shape(shape: tuple[int, ...], outputs: int, then: Then) -> tuple[int, ...]:
    if isinstance(then, Rotary):
        return (1, outputs // then.head, 1, then.head)
    return (*shape[:-1], outputs)


def turns(layers: Sequence[Projection], rotary: Rotary) -> bool:
    """Whether a reduction can apply rotary positions to these projections: no pair lies in two bands."""
    whole = all(band % rotary.head == 0 for band, _ in bands(layers))
    whole = whole and all(layer.outputs % rotary.head == 0 for layer in layers)
    return whole and rotary.dims % 2 == 0 and 8 <= rotary.dims <= rotary.head


def bands(layers: Sequence[Projection]) -> list[tuple[int, int]]:
    """Per layer its band, in outputs, and the number of bands."""
    return [(layer.weight.shape[-1] * 32 // layer.bits, layer.weight.shape[-3]) for layer in layers]


def settings_of(
    layers: Sequence[Projection],
    joined: Sequence[weights.Joined],
    cut: geometry.Cut,
    dense: bool,
    norm: Norm | None = None,
    biased: bool | None = None,
) -> mx.array:
    """The settings array of a launch: see metal/settings.h. biased: with the layers' biases; None: if any."""
    inputs = layers[0].weight.shape[-2]
    projections: list[ProjectionSettings] = []
    tiles = 0
    for layer, (band, number), one in zip(layers, bands(layers), joined, strict=True):
        own = ProjectionSettings(tiles, band, cut.tiles(band), layer.outputs, *one.starts)
        projections.append(own)
        tiles += own.tiles * number
    eps = norm.eps if norm else 0.0
    launch = LaunchSettings(inputs, cut.stripe, tiles * cut.tile + COUNTS, len(layers), BOTH, eps)
    given = [None if dense else layer.threshold for layer in layers]
    floats = [mx.zeros((1,)) if one is None else one.astype(mx.float32) for one in given]
    if per_channel(layers, dense=dense):
        floats = [mx.broadcast_to(one, (inputs,)) for one in floats]
    if has_bias(layers) if biased is None else biased:
        biases = [layer.get("bias") for layer in layers]
        floats += [
            mx.zeros((layer.outputs,)) if bias is None else bias.astype(mx.float32)
            for layer, bias in zip(layers, biases, strict=True)
        ]
    if norm:
        floats.append(norm.weight.astype(mx.float32))
    return pack(launch, projections, floats)


def has_bias(layers: Sequence[Projection]) -> bool:
    """Whether any of these projections has a bias."""
    return any(layer.get("bias") is not None for layer in layers)


def per_channel(layers: Sequence[Projection], *, dense: bool) -> bool:
    """Whether a launch needs a threshold for each channel."""
    thresholds = [layer.threshold for layer in layers]
    return not dense and any(one is not None and one.size > 1 for one in thresholds)


def constants_of(
    dtype: mx.Dtype, layers: Sequence[Projection], cut: geometry.Geometry, form: Form
) -> Constants:
    """What sparse_gemv.metal takes for granted in a launch."""
    return (
        ("T", TYPES[dtype]),
        ("S", TYPES[layers[0].scales.dtype]),
        ("BITS", layers[0].bits),
        ("GROUP", layers[0].group_size),
        ("P", len(layers)),
        ("PER_CHANNEL", int(per_channel(layers, dense=form.dense))),
        ("HAS_BIAS", int(has_bias(layers))),
        ("NORMED", int(form.norm is not None)),
        ("OUTPUTS", cut.outputs),
        ("LANES", cut.lanes),
        ("ROWS", cut.rows),
        ("UNROLL", cut.unroll),
        ("LIST", cut.list),
        ("SLICE", cut.slice),
        ("DECODE", cut.decode),
        ("PADDED", cut.padded),
    )
