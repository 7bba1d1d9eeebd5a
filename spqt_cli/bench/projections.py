"""What the kernel benchmark measures: the projections of a model's decode step, with random weights.

It makes arrays and times nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.backends import select
from spqt_cli.decode import profile, relayout
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout

ROTATE_BYTES = {"gpu": 1 << 29, "cpu": 1 << 27}  # of weights: caches hold at most a quarter of this
# What memory hands over at once: 64 bytes on most CPUs, 128 on NVIDIA's GPUs (in sectors of 32). A chunk
# smaller than a line is not skipped unless its neighbours are too.
LINE_BYTES = 128


@dataclass(frozen=True)
class Work:
    """A unit to measure: one projection or several of one input. outputs: of each.

    key: of the profile. is_head: never sparse, since every logit is wanted.
    """

    name: str
    outputs: tuple[int, ...]
    inputs: int
    bits: int
    group_size: int
    dtype: mx.Dtype
    key: str
    is_head: bool = False

    @property
    def shape(self) -> str:
        return "+".join(f"{outputs}x{self.inputs}" for outputs in self.outputs)


@dataclass
class Copy:
    """One of the rotating sets of weights, in both layouts."""

    layers: list[Any]  # ZigzagLinear
    rows: list[tuple[mx.array, ...]]  # weight, scales, biases; or one plain matrix


def works(model: nn.Module, dtype: mx.Dtype) -> list[Work]:
    """What a model's decode step is made of: its units, their single projections, and the head."""
    found: dict[str, Work] = {}
    names: dict[str, set[str]] = {}
    for unit in profile.units(model):
        alone = [profile.Unit({path: layer}) for path, layer in unit.layers.items()]
        for part in [unit, *(alone if len(alone) > 1 else [])]:
            first = next(iter(part.layers.values()))
            outputs = tuple(layer.outputs for layer in part.layers.values())
            names.setdefault(part.key, set()).add(part.name)
            found[part.key] = Work(
                part.name, outputs, first.inputs, first.bits, first.group_size, dtype, part.key
            )
    result = [
        Work(", ".join(sorted(names[key])), work.outputs, work.inputs, work.bits, work.group_size, dtype, key)
        for key, work in found.items()
    ]
    head = relayout.find_head(model)
    if head is not None:
        (vocabulary, inputs), bits, group_size = head.sizes
        result.append(Work("head", (vocabulary,), inputs, bits, group_size, dtype, head.key, is_head=True))
    return result


def make_copies(work: Work) -> list[Copy]:
    """Sets of random weights in both layouts, enough of them to outgrow caches."""
    first = _first_copy(work)
    arrays = [a for layer in first.layers for a in (layer.weight, layer["scales"], layer["biases"])]
    size = sum(array.nbytes for array in arrays)
    device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    count = max(2, -(-ROTATE_BYTES[device] // size))
    copies = [first]
    for _ in range(count - 1):
        layers = [_twin(layer) for layer in first.layers]
        rows = [tuple(_copied(array) for array in packed) for packed in first.rows]
        mx.eval(rows)
        copies.append(Copy(layers, rows))
    mx.clear_cache()
    return copies


def _first_copy(work: Work) -> Copy:
    layers, rows = [], []
    dtype = mx.bfloat16 if select.backend().native_float32 else work.dtype  # as hooks.py leaves it
    for outputs in work.outputs:
        w = (mx.random.normal((outputs, work.inputs)) * work.inputs**-0.5).astype(dtype)
        band = layout.band_of(outputs, work.group_size)
        layer = ZigzagLinear(outputs, work.bits, work.group_size, band)
        layer.weight, layer.scales, layer.biases = layout.quantize(w, work.bits, work.group_size, band)
        layer.freeze()
        mx.eval(layer.weight, layer.scales, layer.biases)
        back = layer.dequantized().astype(work.dtype)
        whole = work.inputs % work.group_size == 0  # else stock MLX can't quantize the matrix
        rows.append(layout.quantize_rows(back, work.bits, work.group_size) if whole else (back,))
        mx.eval(rows[-1])
        layers.append(layer)
    mx.clear_cache()
    return Copy(layers, [tuple(packed) for packed in rows])


def _copied(array: mx.array) -> mx.array:
    return (array | 0) if array.dtype == mx.uint32 else array * 1  # a buffer of its own


def _twin(layer: ZigzagLinear) -> ZigzagLinear:
    twin = ZigzagLinear(layer.outputs, layer.bits, layer.group_size, layer.band)
    twin.weight, twin.scales, twin.biases = (_copied(layer[name]) for name in ("weight", "scales", "biases"))
    twin.freeze()
    mx.eval(twin.weight, twin.scales, twin.biases)
    return twin


def with_threshold(copies: list[Copy], threshold: mx.array) -> list[Copy]:
    """The same arrays in layers that skip by `threshold`, (1,) float32."""
    mx.eval(threshold)
    result = []
    for copy in copies:
        layers = []
        for layer in copy.layers:
            twin = ZigzagLinear(layer.outputs, layer.bits, layer.group_size, layer.band)
            twin.weight, twin.scales, twin.biases = layer.weight, layer.scales, layer.biases
            twin.freeze()
            twin.set_threshold(threshold)
            layers.append(twin)
        result.append(Copy(layers, copy.rows))
    return result


def chunk_bytes(bits: int, group_size: int, band: int, scale_bytes: int) -> tuple[int, int, int]:
    """Bytes that one input channel of one band takes in codes, scales and biases."""
    scales = band // group_size * scale_bytes
    return band * bits // 8, scales, scales


def line_bytes(active: np.ndarray, bands: int, chunks: Sequence[int], line: int = LINE_BYTES) -> int:
    """Bytes of all lines that hold a chunk of an active channel.

    active: (inputs,), bool. chunks: from `chunk_bytes`; each array is taken to begin at a line.
    """
    return sum(_lines(active, chunk, bands, line) * line for chunk in chunks)


def _lines(active: np.ndarray, chunk: int, bands: int, line: int) -> int:
    """Lines of an array of (bands, inputs) chunks that an active channel's chunk lies in."""
    channels = np.flatnonzero(active)
    starts = (np.arange(bands)[:, None] * active.size + channels[None]).reshape(-1) * chunk
    total = -(-bands * active.size * chunk // line)
    edges = np.zeros(total + 1, np.int64)  # +1 where a chunk's lines begin, -1 after they end
    np.add.at(edges, starts // line, 1)
    np.add.at(edges, (starts + chunk - 1) // line + 1, -1)
    return int(np.count_nonzero(np.cumsum(edges)[:total] > 0))
