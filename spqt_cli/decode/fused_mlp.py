"""Gated feed-forward modules, down(silu(gate(x)) * up(x)), as one call in decode steps.

The GPU kernels then apply silu and the product where they add up gate and up, and Python is asked once per
module instead of once per layer. It serves modules whose block does not run fused as a whole.
"""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, phase, prepared, recognize
from spqt_cli.decode.layers import SharedInput

ATTRIBUTE = "_fused_mlp"


def install(module: nn.Module) -> None:
    """Let a module with Zigzag gate, up and down run as one call, if that is what its class computes."""
    names = recognize.gated(module) if ATTRIBUTE not in module.__dict__ else None
    if names is not None and all(recognize.is_zigzag(module[name]) for name in names):
        prepared.answer_calls(module, ATTRIBUTE, FusedMLP(module, names))


class FusedMLP:
    """One module's step, prepared for its layers as they are.

    It gives None, and the module's own code runs, where they can't be fused, and for a prompt of one row
    where layers skip channels: prompts run dense.
    """

    def __init__(self, module: Any, names: tuple[str, str, str]) -> None:
        self.module, self.names = module, names
        self._form: tuple[Any, ...] = ()
        self._sources = prepared.Sources([])
        self._step: interface.GatedStep | None = None
        self._groups: list[SharedInput] = []  # gate and up; down
        self._skips = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedMLP":
        """The same for the copied module; what was prepared belongs to the old one."""
        return FusedMLP(copy.deepcopy(self.module, memo), self.names)

    def __call__(self, x: mx.array, *others: Any, **named: Any) -> mx.array | None:
        """y for x, one row; None where the module's own code is to run."""
        if others or named:
            return None
        if (x.dtype, x.ndim) != self._form or not self._sources.unchanged():
            self._prepare(x)
        if self._step is None or (self._skips and not phase.decodes()):
            return None
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._groups)
        if tally is None:
            return self._step(x, None, None)[0]
        y, *counted = self._step(x, *tally.running)
        tally.keep(counted)
        return y

    def _prepare(self, x: mx.array) -> None:
        layers = [self.module.get(name) for name in self.names]
        self._form, self._step = (x.dtype, x.ndim), None
        prepared.arrange(layers)
        places = [(self.module, name) for name in self.names]
        self._sources = prepared.Sources([*places, *prepared.of_layers(layers)])
        if not all(map(recognize.is_zigzag, layers)):
            return  # a profile's row-grouped layer, or a watched one
        gate, up, down = layers
        if [id(layer) for layer in gate.shared_input.layers] == [id(gate), id(up)]:
            self._groups = [gate.shared_input, down.shared_input]
            self._skips = any(layer.threshold is not None for layer in layers)
            self._step = select.prepare_gated(x, [gate, up], down)
