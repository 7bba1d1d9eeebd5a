"""The Metal and CUDA kernels: their texts, names, template integers and launches.

The bodies are package data in `metal/`; each kernel is built once. It knows layers only through
`kernels.Projection` and decides nothing about thresholds or models.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from spqt_cli import geometry, layout

if TYPE_CHECKING:
    from spqt_cli.kernels import Projection

MAX_SHARED = 6  # projections in one launch: Metal binds at most 31 buffers, this takes 4 P + 3
REDUCE_PARTS = 8  # simdgroups that share the stripes of 32 outputs: short loops, 256 threads
COUNTS = 32  # entries after the partial sums of a stripe: a whole 128-byte line
TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


class Kernel(NamedTuple):
    """What MLX needs to build a kernel. Its template integers are constants in the text."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    threads: int


class Launch(NamedTuple):
    """One call of a kernel, all but its inputs; depends on shapes only."""

    kernel: Kernel
    threadgroups: tuple[int, int]
    shapes: list[tuple[int, ...]]
    dtypes: list[mx.Dtype]


class Plan(NamedTuple):
    """All that a call can reuse: what depends on the layers and on x's shape and dtype."""

    known: tuple[mx.array, ...]  # weights and thresholds, to see that they are still the same
    inputs: list[mx.array]  # of the first launch, after x
    gemv: Launch
    reduce: Launch | None


def status() -> tuple[str | None, str]:
    """The kind of GPU kernels that can run here, "metal", "cuda" or None, and why."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None, "MLX's default device is the CPU"
    if mx.metal.is_available():
        return "metal", "MLX has a Metal GPU"
    if mx.cuda.is_available():
        return "cuda", "MLX has a CUDA GPU"
    return None, "MLX has no GPU here"


@cache
def device_class() -> str:
    """The kind of device that `geometry.choose` tells apart."""
    if mx.cuda.is_available():
        return "cuda"
    letter = str(mx.device_info().get("architecture", ""))[-1:]  # applegpu_g13s: a Max
    return letter if letter in geometry.THREADGROUPS else "g"


def sparse_gemv(x: mx.array, layers: Sequence["Projection"]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row, float16, bfloat16 or float32.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels per layer, (n,) uint32.
    """
    if len(layers) > 1 and not one_launch(layers):
        parts = [sparse_gemv(x, [layer]) for layer in layers]
        return [ys[0] for ys, _ in parts], mx.concatenate([active for _, active in parts])
    plan = _plan(x, layers)
    *outputs, active = results = run(plan.gemv, [x, *plan.inputs])
    if plan.reduce is not None:
        *outputs, active = run(plan.reduce, [*results, plan.inputs[0]])
    return outputs, active


def run(launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """The outputs of one kernel call; lazy."""
    x, y = launch.threadgroups
    threads = launch.kernel.threads
    return _built(launch.kernel)(
        inputs=inputs,
        grid=(x * threads, y, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )


@cache
def _built(kernel: Kernel) -> Callable[..., list[mx.array]]:
    names = {"input_names": list(kernel.inputs), "output_names": list(kernel.outputs)}
    if mx.metal.is_available():
        return mx.fast.metal_kernel(name=kernel.name, source=kernel.source, header=header(), **names)
    shim = f"#define SPQT_THREADS {kernel.threads}\n{body('shim_cuda.h')}{header()}"
    return mx.fast.cuda_kernel(name=kernel.name, source=kernel.source, header=shim, **names)


def header() -> str:
    """The helper functions of the bodies."""
    return body("lane_order.h")


@cache
def body(name: str) -> str:
    """The text of a file in `metal/` without comments: MLX copies and hashes it in every call."""
    text = resources.files("spqt_cli.metal").joinpath(name).read_text()
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]*//[^\n]*", "", text)).lstrip()


def one_launch(layers: Sequence["Projection"]) -> bool:
    """Whether these projections can share a launch: equal in all that the kernel has as constants."""
    kinds = {(layer.bits, layer.group_size, layer.scales.dtype) for layer in layers}
    return len(kinds) == 1 and len(layers) <= MAX_SHARED


def _plan(x: mx.array, layers: Sequence["Projection"]) -> Plan:
    plans = layers[0].__dict__.setdefault("_gpu_plans", {})
    key = (x.shape, x.dtype, *map(id, layers))
    plan = plans.get(key)
    if plan is not None:
        known = iter(plan.known)
        if all(one.weight is next(known) and one.threshold is next(known) for one in layers):
            return plan
    plan = plans[key] = make_plan(x.shape, x.dtype, layers)
    return plan


def make_plan(shape: tuple[int, ...], dtype: mx.Dtype, layers: Sequence["Projection"]) -> Plan:
    """The launches and the settings array for these layers and an x of this shape and dtype."""
    bands = [(_band(layer), layer.weight.shape[0]) for layer in layers]
    cut = geometry.choose(device_class(), bands, shape[-1])
    stripes = cut.stripes(shape[-1])
    tiles = sum(cut.tiles(band) * number for band, number in bands)
    settings = _settings(layers, bands, cut, tiles)
    constants = _constants(dtype, layers, cut)
    y_shapes = [(*shape[:-1], layer.outputs) for layer in layers]
    packed = [array for layer in layers for array in (layer.weight, layer.scales, layer.biases)]
    known = tuple(array for layer in layers for array in (layer.weight, layer.threshold))
    outputs = [*y_shapes, (len(layers),)]
    dtypes = [*[dtype] * len(layers), mx.uint32]
    if stripes == 1:
        gemv = Launch(gemv_kernel(constants, cut.threads), (tiles, 1), outputs, dtypes)
        return Plan(known, [settings, *packed], gemv, None)
    positions = tiles * cut.tile
    partial = (*constants, ("PARTIAL", 1))
    shapes = [(stripes, positions + COUNTS)]
    gemv = Launch(gemv_kernel(partial, cut.threads), (tiles, stripes), shapes, [mx.float32])
    reduce = Launch(reduce_kernel(constants), (positions // geometry.SIMD, 1), outputs, dtypes)
    return Plan(known, [settings, *packed], gemv, reduce)


def _band(layer: "Projection") -> int:
    return layer.weight.shape[2] * 32 // layer.bits


def _settings(
    layers: Sequence["Projection"], bands: list[tuple[int, int]], cut: geometry.Geometry, tiles: int
) -> mx.array:
    """The uint32 array that sparse_gemv.metal describes; evaluated, so that any thread may use it."""
    inputs = layers[0].weight.shape[1]
    numbers = [inputs, cut.stripe, tiles * cut.tile + COUNTS]
    first = 0
    for layer, (band, number) in zip(layers, bands, strict=True):
        numbers += [first, band, cut.tiles(band), layer.outputs]
        first += cut.tiles(band) * number
    thresholds = [layer.threshold.astype(mx.float32) for layer in layers]
    if _per_channel(layers):
        thresholds = [mx.broadcast_to(one, (inputs,)) for one in thresholds]
    floats = [mx.array(numbers, dtype=mx.uint32).view(mx.float32), *thresholds]
    if _has_bias(layers):
        biases = [layer.get("bias") for layer in layers]
        floats += [
            mx.zeros((layer.outputs,)) if bias is None else bias.astype(mx.float32)
            for layer, bias in zip(layers, biases, strict=True)
        ]
    settings = mx.concatenate(floats).view(mx.uint32)
    mx.eval(settings)
    return settings


def _has_bias(layers: Sequence["Projection"]) -> bool:
    return any(layer.get("bias") is not None for layer in layers)


def _per_channel(layers: Sequence["Projection"]) -> bool:
    return any(layer.threshold.size > 1 for layer in layers)


def _constants(
    dtype: mx.Dtype, layers: Sequence["Projection"], cut: geometry.Geometry
) -> tuple[tuple[str, int | str], ...]:
    return (
        ("T", TYPES[dtype]),
        ("S", TYPES[layers[0].scales.dtype]),
        ("BITS", layers[0].bits),
        ("GROUP", layers[0].group_size),
        ("P", len(layers)),
        ("PER_CHANNEL", int(_per_channel(layers))),
        ("HAS_BIAS", int(_has_bias(layers))),
        ("OUTPUTS", cut.outputs),
        ("LANES", cut.lanes),
        ("ROWS", cut.rows),
        ("UNROLL", cut.unroll),
        ("LIST", cut.list),
        ("SLICE", cut.slice),
        ("DECODE", cut.decode),
    )


@cache
def gemv_kernel(constants: tuple[tuple[str, int | str], ...], threads: int) -> Kernel:
    """sparse_gemv.metal with its constants; with PARTIAL it writes partial sums, not y."""
    named = dict(constants)
    count, partial = int(named["P"]), "PARTIAL" in named
    lines = _declared({**named, "Y": "float" if partial else named["T"], "THREADS": threads})
    lines += [
        f"constexpr int PARTIAL = {int(partial)};" if not partial else "",
        f"constexpr int COUNTS = {COUNTS if partial else 'P'};",
        "const uint tile = threadgroup_position_in_grid.x;",
        *_projection_of_tile(count),
    ]
    for name, kind in (("weight", "uint32_t"), ("scales", "S"), ("biases", "S")):
        lines.append(f"const device {kind}* {name} = {_pick(name, count)};")
    if partial:
        lines += [
            "device float* stripe_partials = partials + ulong(threadgroup_position_in_grid.y) * settings[2];",
            "device float* y = stripe_partials + tile * (LANES * OUTPUTS);",
            f"device uint32_t* counts = (device uint32_t*)(stripe_partials + settings[2] - {COUNTS});",
        ]
    else:
        lines += [f"device Y* y = {_pick('y', count)};", "device uint32_t* counts = active;"]
    packed = [f"{name}_{p}" for p in range(count) for name in ("weight", "scales", "biases")]
    ys = ["partials"] if partial else [*(f"y_{p}" for p in range(count)), "active"]
    return Kernel(
        _name("gemv", named),
        ("x", "settings", *packed),
        tuple(ys),
        "\n".join(filter(None, lines)) + "\n" + body("sparse_gemv.metal"),
        threads,
    )


@cache
def reduce_kernel(constants: tuple[tuple[str, int | str], ...]) -> Kernel:
    """reduce_stripes.metal with its constants."""
    named = {k: v for k, v in constants if k in ("T", "P", "PER_CHANNEL", "HAS_BIAS", "OUTPUTS", "LANES")}
    count = int(named["P"])
    lines = [
        *_declared({**named, "Y": named["T"], "PARTS": REDUCE_PARTS}),
        "constexpr uint THRESHOLDS = 3 + 4 * P;",
        f"const uint tile = threadgroup_position_in_grid.x * {geometry.SIMD} / (LANES * OUTPUTS);",
        *_projection_of_tile(count),
        f"device Y* y = {_pick('y', count)};",
    ]
    return Kernel(
        _name("reduce", named),
        ("partials", "settings"),
        (*(f"y_{p}" for p in range(count)), "active"),
        "\n".join(lines) + "\n" + body("reduce_stripes.metal"),
        REDUCE_PARTS * geometry.SIMD,
    )


def _declared(named: dict[str, int | str]) -> list[str]:
    return [
        f"typedef {value} {name};" if isinstance(value, str) else f"constexpr int {name} = {value};"
        for name, value in named.items()
    ]


def _name(kernel: str, named: dict[str, int | str]) -> str:
    return f"spqt_{kernel}_" + "_".join(str(value) for value in named.values())


def _projection_of_tile(count: int) -> list[str]:
    """Lines that find a tile's projection, by how many later ones have begun, and its bias."""
    begun = [f"uint(tile >= settings[{3 + 4 * p}])" for p in range(1, count)]
    before = [f"(projection > {p} ? settings[{6 + 4 * p}] : 0)" for p in range(count - 1)]
    thresholds = "(PER_CHANNEL ? P * settings[0] : P)"
    return [
        f"const uint projection = {' + '.join(begun) or '0'};",
        f"const uint bias_first = {' + '.join(['3 + 4 * P', thresholds, *before])};",
    ]


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
