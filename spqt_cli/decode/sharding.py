"""Zigzag layers cut over processes: what `shard_linear` and `shard_inplace` of MLX are to row-grouped ones.

    all-to-sharded: every process has the whole input and some outputs. Whole bands where they fit, else whole
        groups in bands of their own; outputs that begin or end within a group take the groups that cover
        them, and `Part.finish` leaves the others out.
    sharded-to-all: every process has some inputs, so chunks as they are, and part of every output's sum.
        `Part.finish` adds the sums up; the layer's bias is the first process's alone.

It knows layers and layout; it knows neither models nor how processes find one another.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

from spqt_cli.decode.layers import ZigzagLayer
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import layout

ALL_TO_SHARDED, SHARDED_TO_ALL = "all-to-sharded", "sharded-to-all"
Segments = int | Sequence[int | float]


@dataclass(frozen=True, eq=False)
class Part:
    """What a process has of a layer.

    inputs: which of the whole layer's `whole_inputs`; kept: which of the outputs computed are the layer's;
    () stands for all. group: adds results up over processes; None: nothing is to be added, or others do it.
    """

    inputs: Sequence[range] = ()
    whole_inputs: int = 0
    kept: Sequence[range] = ()
    group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        return self

    @property
    def is_first(self) -> bool:
        """Whether this process adds what is to be added once."""
        return self.group is None or self.group.rank() == 0

    def threshold(self, threshold: mx.array) -> mx.array:
        """Of thresholds by the whole layer's channels those of this part. (1,) or (whole inputs,) float32."""
        if not self.inputs or threshold.size == 1 or threshold.size != self.whole_inputs:
            return threshold
        return mx.concatenate([threshold[one.start : one.stop] for one in self.inputs])

    def finish(self, y: mx.array) -> mx.array:
        """The layer's outputs of this process's products, (..., outputs)."""
        if self.kept:
            parts = [y[..., one.start : one.stop] for one in self.kept]
            y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return y if self.group is None else self.total(y)

    def total(self, y: mx.array) -> mx.array:
        """y added up over the processes of `group`."""
        return mx.distributed.all_sum(y, group=self.group)


def shard_linear(layer: ZigzagLayer, sharding: str, segments: Segments, group: Any) -> ZigzagLayer:
    """A layer of this process's part, which communicates by itself; `layer` stays as it is.

    segments: as MLX's: a number of equal ones, where they end, or which fractions they end at.
    Raises UnsupportedError for sizes that the processes do not divide.
    """
    part: ZigzagLayer = copy.copy(layer)
    part.__dict__.pop("shared_input", None)
    shard_inplace(part, sharding, segments, group)
    if sharding == SHARDED_TO_ALL:
        assert part.part is not None
        part.part = Part(part.part.inputs, part.part.whole_inputs, group=group)
        if not part.part.is_first:
            part.pop("bias", None)
    return part


def shard_inplace(layer: ZigzagLayer, sharding: str, segments: Segments, group: Any) -> None:
    """Let a layer keep this process's part alone; who calls it adds results up. Raises as `shard_linear`."""
    if layer.part is not None:
        raise UnsupportedError("a Zigzag layer was cut twice", "shard a model once, as it is loaded")
    if sharding == ALL_TO_SHARDED:
        _keep_outputs(layer, _ranges(layer.outputs, segments, group, "outputs"))
    else:
        _keep_inputs(layer, _ranges(layer.inputs, segments, group, "inputs"))
    mx.eval(layer.parameters())  # so that no more than one whole layer is in memory
    layer.set_threshold(layer.threshold)


def _ranges(size: int, segments: Segments, group: Any, what: str) -> list[range]:
    """The part of each segment that is this process's."""
    count, rank = group.size(), group.rank()
    if isinstance(segments, int):
        ends = [size * at // segments for at in range(1, segments)]
    else:
        ends = [end if isinstance(end, int) else int(end * size) for end in segments]
    found = []
    for start, stop in pairwise([0, *ends, size]):
        width, rest = divmod(stop - start, count)
        if rest:
            raise UnsupportedError(
                f"{stop - start} {what} of a layer can't be divided among {count} processes",
                "use a number of processes that divides the model's sizes, or --pipeline",
            )
        found.append(range(start + rank * width, start + (rank + 1) * width))
    return found


def _keep_outputs(layer: ZigzagLayer, wanted: Sequence[range]) -> None:
    size, in_band = layer.group_size, layer.band // layer.group_size
    groups = [range(one.start // size, -(-one.stop // size)) for one in wanted]
    before = [sum(map(len, groups[:at])) * size for at in range(len(groups))]
    kept = [
        range(start + one.start % size, start + one.start % size + len(one))
        for start, one in zip(before, wanted, strict=True)
    ]
    count = sum(map(len, groups))
    whole = len(groups) == 1 and groups[0].start % in_band == 0 and count % in_band == 0
    outputs = kept[-1].stop
    band = layer.band if whole else layout.band_of(outputs, size)
    for name in ("weight", "scales", "biases"):
        layer[name] = layout.take_groups(layer[name], groups, in_band, band // size)
    if "bias" in layer:
        layer.bias = _covering(layer.bias, groups, size)[..., :outputs]
    layer.outputs, layer.band = outputs, band
    if sum(map(len, kept)) < outputs:
        layer.part = Part(kept=kept)


def _covering(bias: mx.array, groups: Sequence[range], size: int) -> mx.array:
    """The bias of all outputs of these groups, (..., outputs); zeros where there is no such output."""
    missing = max(one.stop for one in groups) * size - bias.shape[-1]
    if missing > 0:
        bias = mx.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, missing)])
    return mx.concatenate([bias[..., one.start * size : one.stop * size] for one in groups], axis=-1)


def _keep_inputs(layer: ZigzagLayer, wanted: Sequence[range]) -> None:
    whole = layer.inputs
    for name in ("weight", "scales", "biases"):
        layer[name] = layout.take_inputs(layer[name], wanted)
    layer.part = Part(inputs=wanted, whole_inputs=whole)
