"""The Metal and CUDA kernels: their names, template integers and launches.

The bodies are package data in `metal/`; each kernel is built once. It knows layers only through
`kernels.Projection` and decides nothing about thresholds or models.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from spqt_cli import geometry, layout

if TYPE_CHECKING:
    from spqt_cli.kernels import Projection

MAX_SHARED = 6  # projections in one launch: Metal binds at most 31 buffers, this one 4 P + 5
REDUCE_PARTS = 8  # simdgroups that share the stripes of 32 outputs: short loops, 256 threads
HEADER_SIZES = 4  # entries of `sizes` before those of the projections, 5 each


class Kernel(NamedTuple):
    """What MLX needs to build a kernel."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str


class Launch(NamedTuple):
    """One call of a kernel, all but its inputs; depends on shapes only."""

    kernel: Kernel
    template: list[tuple[str, Any]]
    threadgroups: tuple[int, int]
    threads: int
    shapes: list[tuple[int, ...]]
    dtypes: list[mx.Dtype]


class Plan(NamedTuple):
    """All that a call can reuse: what depends on the layers and on x's shape and dtype."""

    weights: tuple[mx.array, ...]  # of the layers, to see that they are still the same
    thresholds: tuple[mx.array, ...]
    inputs: list[mx.array]  # of the first launch, after x
    gemv: Launch
    reduce: Launch | None
    sizes: mx.array
    bias: mx.array


def status() -> tuple[str | None, str]:
    """The kind of GPU kernels that can run here, "metal", "cuda" or None, and why."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None, "MLX's default device is the CPU"
    if mx.metal.is_available():
        return "metal", "MLX has a Metal GPU"
    if mx.cuda.is_available():
        return "cuda", "MLX has a CUDA GPU"
    return None, "MLX has no GPU here"


def sparse_gemv(x: mx.array, layers: Sequence["Projection"]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row, float16, bfloat16 or float32.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels per layer, (n,) uint32.
    """
    if not _one_launch(layers):
        parts = [sparse_gemv(x, [layer]) for layer in layers]
        return [ys[0] for ys, _ in parts], mx.concatenate([active for _, active in parts])
    plan = _plan(x, layers)
    *outputs, active = run(plan.gemv, [x, *plan.inputs])
    if plan.reduce is not None:
        *outputs, active = run(plan.reduce, [*outputs, active, plan.sizes, plan.bias])
    return outputs, active


def run(launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """The outputs of one kernel call; lazy."""
    x, y = launch.threadgroups
    return _built(launch.kernel)(
        inputs=inputs,
        template=launch.template,
        grid=(x * launch.threads, y, 1),
        threadgroup=(launch.threads, 1, 1),
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )


@cache
def _built(kernel: Kernel) -> Callable[..., list[mx.array]]:
    names = {"input_names": list(kernel.inputs), "output_names": list(kernel.outputs)}
    if mx.metal.is_available():
        return mx.fast.metal_kernel(name=kernel.name, source=kernel.source, **names)
    header = body("shim_cuda.h")
    return mx.fast.cuda_kernel(name=kernel.name, source=kernel.source, header=header, **names)


@cache
def body(name: str) -> str:
    """The text of a file in `metal/` without comments: MLX copies and hashes it in every call."""
    text = resources.files("spqt_cli.metal").joinpath(name).read_text()
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]*//[^\n]*", "", text)).lstrip()


def _one_launch(layers: Sequence["Projection"]) -> bool:
    kinds = {(layer.bits, layer.group_size, layer.scales.dtype) for layer in layers}
    return len(layers) == 1 or (len(kinds) == 1 and len(layers) <= MAX_SHARED)


def _plan(x: mx.array, layers: Sequence["Projection"]) -> Plan:
    plans = layers[0].__dict__.setdefault("_gpu_plans", {})
    key = (x.shape, x.dtype, *map(id, layers))
    plan = plans.get(key)
    if plan is None or not all(
        layer.weight is weight and layer.threshold is threshold
        for layer, weight, threshold in zip(layers, plan.weights, plan.thresholds, strict=True)
    ):
        plan = plans[key] = make_plan(x.shape, x.dtype, layers)
    return plan


def make_plan(shape: tuple[int, ...], dtype: mx.Dtype, layers: Sequence["Projection"]) -> Plan:
    """The launches, sizes and small arrays for these layers and an x of this shape and dtype."""
    kind, _ = status()
    bands = [(_band(layer), layer.weight.shape[0]) for layer in layers]
    inputs = shape[-1]
    cut = geometry.choose(kind or "metal", bands, inputs)
    sizes, tiles, rows = _sizes(layers, bands, cut, inputs)
    bias = _bias(layers, bands)
    thresholds = _thresholds(layers, inputs)
    small = [thresholds, sizes, bias]
    mx.eval(small)  # a lazy constant would belong to this thread's stream alone
    stripes = cut.stripes(inputs)
    y_shapes = [(*shape[:-1], layer.outputs) for layer in layers]
    template = _template(dtype, layers, cut, has_bias=stripes == 1 and _has_bias(layers))
    template += [("PER_CHANNEL", int(thresholds.size > len(layers)))]
    direct = stripes == 1
    gemv = Launch(
        gemv_kernel(len(layers), direct),
        [*template, ("Y", dtype if direct else mx.float32)],
        (tiles, stripes),
        cut.threads,
        [*(y_shapes if direct else [(stripes, rows)]), (len(layers), *(() if direct else (stripes,)))],
        [*([dtype] * len(layers) if direct else [mx.float32]), mx.uint32],
    )
    reduce = None
    if not direct:
        reduce = Launch(
            reduce_kernel(len(layers)),
            [("PARTS", REDUCE_PARTS), ("P", len(layers)), ("HAS_BIAS", int(_has_bias(layers))), ("Y", dtype)],
            (rows // geometry.LANE_OUTPUTS, 1),
            REDUCE_PARTS * geometry.SIMD,
            [*y_shapes, (len(layers),)],
            [*[dtype] * len(layers), mx.uint32],
        )
    packed = [array for layer in layers for array in (layer.weight, layer.scales, layer.biases)]
    return Plan(
        tuple(layer.weight for layer in layers),
        tuple(layer.threshold for layer in layers),
        [*small, *packed],
        gemv,
        reduce,
        sizes,
        bias,
    )


def _band(layer: "Projection") -> int:
    return layer.weight.shape[2] * 32 // layer.bits


def _has_bias(layers: Sequence["Projection"]) -> bool:
    return any(layer.get("bias") is not None for layer in layers)


def _sizes(
    layers: Sequence["Projection"], bands: list[tuple[int, int]], cut: geometry.Geometry, inputs: int
) -> tuple[mx.array, int, int]:
    tiles = rows = 0
    entries = []
    for layer, (band, number) in zip(layers, bands, strict=True):
        entries += [tiles, band, cut.tiles(band), rows, layer.outputs]
        tiles += cut.tiles(band) * number
        rows += band * number
    header = [inputs, cut.stripe, cut.stripes(inputs), rows]
    return mx.array(header + entries, dtype=mx.uint32), tiles, rows


def _bias(layers: Sequence["Projection"], bands: list[tuple[int, int]]) -> mx.array:
    if not _has_bias(layers):
        return mx.zeros((8,))  # never read; eight, so that it is a device buffer like the real one
    parts = []
    for layer, (band, number) in zip(layers, bands, strict=True):
        bias = layer.get("bias")
        bias = mx.zeros((layer.outputs,)) if bias is None else bias.astype(mx.float32)
        parts.append(mx.pad(bias, (0, band * number - layer.outputs)))
    return mx.concatenate(parts)


def _thresholds(layers: Sequence["Projection"], inputs: int) -> mx.array:
    thresholds = [layer.threshold.astype(mx.float32) for layer in layers]
    if any(t.size > 1 for t in thresholds):
        thresholds = [mx.broadcast_to(t, (inputs,)) for t in thresholds]
    return mx.concatenate(thresholds)


def _template(
    dtype: mx.Dtype, layers: Sequence["Projection"], cut: geometry.Geometry, *, has_bias: bool
) -> list[tuple[str, Any]]:
    return [
        ("BITS", layers[0].bits),
        ("GROUP", layers[0].group_size),
        ("LANES", cut.lanes),
        ("ROWS", cut.rows),
        ("THREADS", cut.threads),
        ("UNROLL", cut.unroll),
        ("LIST", cut.list),
        ("SLICE", cut.slice),
        ("DECODE", cut.decode),
        ("HAS_BIAS", int(has_bias)),
        ("S", layers[0].scales.dtype),
    ]


@cache
def gemv_kernel(count: int, direct: bool) -> Kernel:
    """sparse_gemv.metal for `count` projections; direct: writes y, not partial sums."""
    lines = ["const uint tile = threadgroup_position_in_grid.x;", _projection("tile", count, 0)]
    for name, kind in (("weight", "uint32_t"), ("scales", "S"), ("biases", "S")):
        lines.append(f"const device {kind}* {name} = {_pick(name, count)};")
    if direct:
        lines.append(f"device Y* y = {_pick('y', count)};")
    else:
        at = f"ulong(threadgroup_position_in_grid.y) * sizes[3] + sizes[{HEADER_SIZES + 3} + 5 * projection]"
        lines.append(f"device Y* y = partials + {at};")
    packed = [f"{name}_{p}" for p in range(count) for name in ("weight", "scales", "biases")]
    ys = [f"y_{p}" for p in range(count)] if direct else ["partials"]
    return Kernel(
        f"spqt_sparse_gemv_{count}_{'direct' if direct else 'stripes'}",
        ("x", "thresholds", "sizes", "bias", *packed),
        (*ys, "active"),
        "\n".join(lines) + "\n" + body("sparse_gemv.metal"),
    )


@cache
def reduce_kernel(count: int) -> Kernel:
    """reduce_stripes.metal for `count` projections."""
    lines = [
        "const uint row_first = threadgroup_position_in_grid.x * 32;",
        _projection("row_first", count, 3),
        f"device Y* y = {_pick('y', count)};",
    ]
    return Kernel(
        f"spqt_reduce_stripes_{count}",
        ("partials", "counts", "sizes", "bias"),
        (*(f"y_{p}" for p in range(count)), "active"),
        "\n".join(lines) + "\n" + body("reduce_stripes.metal"),
    )


def _projection(position: str, count: int, entry: int) -> str:
    """Which projection a tile or row belongs to: how many later ones have begun."""
    begun = [f"uint({position} >= sizes[{HEADER_SIZES + 5 * p + entry}])" for p in range(1, count)]
    return f"const uint projection = {' + '.join(begun) or '0'};"


def _pick(name: str, count: int) -> str:
    chain = f"{name}_{count - 1}"
    for p in reversed(range(count - 1)):
        chain = f"projection == {p} ? {name}_{p} : {chain}"
    return chain


def matmul(x: mx.array, layer: "Projection") -> mx.array:
    """x @ W.T + bias with all channels: x (..., inputs) -> (..., outputs)."""
    packed = (layer.weight, layer.scales, layer.biases)
    y = layout.matmul(x, *packed, outputs=layer.outputs, bits=layer.bits, group_size=layer.group_size)
    bias = layer.get("bias")
    return y if bias is None else y + bias
