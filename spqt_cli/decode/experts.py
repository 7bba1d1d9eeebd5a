"""ZigzagSwitchLinear: the experts of a mixture, one Zigzag matrix each, of which a token is sent to a few.

It stands for mlx-lm's `SwitchLinear`. Projections that read one input (gate and up) run together, all chosen
experts in one operation. It imports mlx-lm, so it is imported where mlx-lm is already (hooks.py).
"""

from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, phase
from spqt_cli.decode.layers import SharedInput, ZigzagLayer
from spqt_cli.format import layout


class ZigzagSwitchLinear(ZigzagLayer, QuantizedSwitchLinear):
    """Experts in the Zigzag layout.

    weight: (experts, bands, inputs, band * bits / 32) uint32; scales, biases: (experts, bands, inputs, band /
    group_size); bias: (experts, outputs) or absent. One threshold serves all experts.
    """

    global_scale = None  # as MLX's nvfp4 has one

    @classmethod
    def from_switch_linear(
        cls, plain: nn.Module, group_size: int, bits: int, *, spqt: dict[str, Any] | None = None
    ) -> Self:
        """Experts whose weights are `plain`'s, quantized when evaluated; as `ZigzagLinear.from_linear`."""
        entry = spqt or {}
        outputs = plain.weight.shape[1]
        layer = cls(outputs, bits, group_size, entry.get("band") or layout.band_of(outputs, group_size))
        layer.take(plain, entry)
        return layer

    shared_input: "SharedExperts"

    def _shared(self, layers: list[Any]) -> "SharedExperts":
        return SharedExperts(layers)

    @property
    def input_dims(self) -> int:
        return self.inputs

    @property
    def output_dims(self) -> int:
        return int(self.outputs)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """y of x (..., rows, inputs), whose leading axes are broadcast against those of indices (...):
        (..., rows, outputs).
        """
        y = self._products(x, indices, sorted_indices)
        return y if self.part is None else self.part.finish(y)

    def _products(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        decodes = phase.decodes()
        few = x.shape[-2] == 1 and 0 < interface.pairs(x, indices) <= select.MOST_CHOSEN
        one = x.size == x.shape[-1] and not self.shared_input.skips  # a token that skips nothing
        if few and (decodes or one):
            return self.shared_input.chosen(x, indices, self)
        if decodes and self._threshold is not None:
            if counter := active_counts.current():
                counter.count_rows(self, _active_of_each(x, indices, self._threshold))
            x = layout.mask(x, self._threshold)
        return select.experts_matmul(x, indices, self, sorted_indices)

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, num_experts={self.num_experts}"


class SharedExperts(SharedInput):
    """Projections of experts that read one input, of the same chosen experts: gate and up, or one alone."""

    def __init__(self, layers: list[Any]) -> None:
        self._indices: mx.array | None = None
        self._reads_all = False
        super().__init__(layers)

    def chosen(self, x: mx.array, indices: mx.array, layer: Any) -> mx.array:
        """layer's y for few x of one row each and the experts chosen for them; as `SharedInput.product`."""
        known = x is self._x and indices is self._indices
        if not known or id(layer) not in self._outputs:
            self._indices = indices
            self._outputs = dict(zip(map(id, self.layers), self._all(x, indices), strict=True))
            self._x = x
        y = self._outputs.pop(id(layer))
        if not self._outputs:
            self._x = self._indices = None
        return y

    def _arrange(self) -> None:
        super()._arrange()
        self._reads_all = not select.backend().skips_experts

    def _all(self, x: mx.array, indices: mx.array) -> list[mx.array]:
        step: Any = self._prepared(select.prepare_experts)
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._alone)
        if tally is not None:
            tally.reads_all = self._reads_all
        outputs, counted = step(x, indices, None if tally is None else tally.running[0])
        if tally is not None:
            tally.keep([counted], interface.pairs(x, indices))
        return outputs


def _active_of_each(x: mx.array, indices: mx.array, threshold: mx.array) -> mx.array:
    """The active channels of every pair of a row and an expert: (pairs * rows,) int."""
    active = x.shape[-1] - layout.inactive(x, threshold).sum(axis=-1)
    return mx.broadcast_arrays(active, indices[..., None])[0].reshape(-1)
