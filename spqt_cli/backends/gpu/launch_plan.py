"""What a launch of the GPU kernels is made of: its text, grid, output shapes and the settings array.

From layers, shapes and a geometry; it runs nothing and does not know the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from spqt_cli.backends.gpu import geometry, joined_weights, kernel_text
from spqt_cli.backends.gpu.kernel_text import COUNTS, Constants, Kernel, Rotary, Then
from spqt_cli.backends.interface import Norm, Projection

# Numbers in `settings`, 16 KB: MLX's CUDA allocator hands smaller arrays out of buffers that the host wrote
# before, which lie in managed memory; where the host touches their page again, a kernel waits 10 us for it.
LEAST_SETTINGS = 4096
MAX_SHARED = 6  # projections in one launch; Metal binds at most 31 buffers, this takes P + 5
TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


class Form(NamedTuple):
    """What a call computes besides its layers' products.

    dense: all channels are used, whatever the thresholds. then: "glu" gives silu(first) * second of two
    layers, "residual" y plus another array, a Rotary turned heads, (1, heads, 1, width) each. norm: what x
    goes through first; its weight has x's dtype.
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

    known: tuple[mx.array | None, ...]  # weights and thresholds, to see that they are still the same
    form: Form  # its norm is kept: a plan is found by the identity of its arrays
    inputs: list[mx.array]  # settings and packed weights
    nothing: mx.array  # (layers,) uint32 zeros: the counts to begin with
    gemv: Launch | None  # None where MLX's own matmul is to run: see backend.py
    reduce: Launch | None
    counts: Launch | None  # beside `reduce`

    def first_inputs(self, x: mx.array, counted: mx.array | None = None) -> list[mx.array]:
        """The arrays of the first launch; where it is the only one it takes the counts so far."""
        before = [] if self.reduce else [self.nothing if counted is None else counted]
        return [x, *self.inputs, *before]


def one_launch(layers: Sequence[Projection]) -> bool:
    """Whether these projections can share a launch: equal in all that the kernel has as constants."""
    kinds = {(layer.bits, layer.group_size, layer.scales.dtype) for layer in layers}
    return len(kinds) == 1 and len(layers) <= MAX_SHARED


def tiny(layers: Sequence[Projection]) -> bool:
    """Whether MLX would pass an array, under eight elements, in another address space: not worth a kernel."""
    return min(array.size for one in layers for array in (one.weight, one.scales, one.biases)) < 8


def make_plan(
    shape: tuple[int, ...], dtype: mx.Dtype, layers: Sequence[Any], cut: geometry.Geometry, form: Form
) -> Plan:
    """The launches and the settings array for these layers and an x of this shape and dtype.

    No launches where something is to follow the sums, and there are no stripes to add up.
    """
    joined = joined_weights.join(layers)
    stripes = cut.stripes(shape[-1])
    tiles = sum(cut.tiles(band) * number for band, number in bands(layers))
    settings = _settings(layers, [one.starts for one in joined], cut, form)
    constants = _constants(dtype, layers, cut, form)
    y_shapes = [_y_shape(shape, layer.outputs, form.then) for layer in layers]
    nothing = mx.zeros(len(layers), mx.uint32)
    known = tuple(array for layer in layers for array in (layer.weight, layer.threshold))
    plan = Plan(known, form, [settings, joined[0].words], nothing, None, None, None)
    mx.eval(nothing)
    results = y_shapes[:1] if form.then == "glu" else y_shapes
    dtypes = [dtype] * len(results)
    if stripes == 1 and form.then:
        return plan
    if stripes == 1:
        kernel = kernel_text.gemv_kernel(constants, cut.threads)
        shapes = [*results, (len(layers),)]
        return plan._replace(gemv=Launch(kernel, (tiles, 1), shapes, [*dtypes, mx.uint32]))
    positions = tiles * cut.tile
    partials = (stripes, positions + COUNTS)
    kernel = kernel_text.gemv_kernel((*constants, ("PARTIAL", 1)), cut.threads)
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
    """Whether a reduction can turn these projections' heads: no pair lies in two bands."""
    whole = all(band % rotary.head == 0 for band, _ in bands(layers))
    whole = whole and all(layer.outputs % rotary.head == 0 for layer in layers)
    return whole and rotary.dims % 2 == 0 and 8 <= rotary.dims <= rotary.head


def bands(layers: Sequence[Projection]) -> list[tuple[int, int]]:
    """Per layer its band, in outputs, and the number of bands."""
    return [(layer.weight.shape[2] * 32 // layer.bits, layer.weight.shape[0]) for layer in layers]


def _settings(
    layers: Sequence[Projection],
    starts: Sequence[Sequence[int]],
    cut: geometry.Geometry,
    form: Form,
) -> mx.array:
    """The uint32 array that sparse_gemv.metal describes; evaluated, so that any thread may use it."""
    inputs = layers[0].weight.shape[1]
    numbers: list[int] = []
    first = 0
    for layer, (band, number), start in zip(layers, bands(layers), starts, strict=True):
        numbers += [first, band, cut.tiles(band), layer.outputs, *start]
        first += cut.tiles(band) * number
    head = [inputs, cut.stripe, first * cut.tile + COUNTS, len(layers)]
    given = [None if form.dense else layer.threshold for layer in layers]
    thresholds = [mx.zeros((1,)) if one is None else one.astype(mx.float32) for one in given]
    if per_channel(layers, dense=form.dense):
        thresholds = [mx.broadcast_to(one, (inputs,)) for one in thresholds]
    eps = mx.array([form.norm.eps if form.norm else 0.0])
    integers = [mx.array(part, dtype=mx.uint32).view(mx.float32) for part in (head, numbers)]
    floats = [integers[0], eps, integers[1], *thresholds]
    if _has_bias(layers):
        biases = [layer.get("bias") for layer in layers]
        floats += [
            mx.zeros((layer.outputs,)) if bias is None else bias.astype(mx.float32)
            for layer, bias in zip(layers, biases, strict=True)
        ]
    if form.norm:
        floats.append(form.norm.weight.astype(mx.float32))
    missing = LEAST_SETTINGS - sum(part.size for part in floats)
    settings = mx.concatenate([*floats, mx.zeros(max(missing, 0))]).view(mx.uint32)
    mx.eval(settings)
    return settings


def _has_bias(layers: Sequence[Projection]) -> bool:
    return any(layer.get("bias") is not None for layer in layers)


def per_channel(layers: Sequence[Projection], *, dense: bool) -> bool:
    """Whether a launch needs a threshold for each channel."""
    thresholds = [layer.threshold for layer in layers]
    return not dense and any(one is not None and one.size > 1 for one in thresholds)


def _constants(
    dtype: mx.Dtype, layers: Sequence[Projection], cut: geometry.Geometry, form: Form
) -> Constants:
    return (
        ("T", TYPES[dtype]),
        ("S", TYPES[layers[0].scales.dtype]),
        ("BITS", layers[0].bits),
        ("GROUP", layers[0].group_size),
        ("P", len(layers)),
        ("PER_CHANNEL", int(per_channel(layers, dense=form.dense))),
        ("HAS_BIAS", int(_has_bias(layers))),
        ("NORMED", int(form.norm is not None)),
        ("OUTPUTS", cut.outputs),
        ("LANES", cut.lanes),
        ("ROWS", cut.rows),
        ("UNROLL", cut.unroll),
        ("LIST", cut.list),
        ("SLICE", cut.slice),
        ("DECODE", cut.decode),
    )
