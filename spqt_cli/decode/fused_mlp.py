"""Gated feed-forward modules, down(silu(gate(x)) * up(x)), as one traced call in decode steps.

The GPU kernels then apply silu and the product where they add up gate and up, and Python is asked once per
module instead of once per layer. It changes how modules are called, not what they hold.
"""

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, phase, prepared
from spqt_cli.decode.layers import SharedInput, ZigzagLinear
from spqt_cli.decode.prepared import Parts

# Names of gate, up and down in mlx-lm's models.
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_TRIAL = mx.array([-6.0, -1.5, -0.3, 0.0, 0.2, 0.9, 2.5, 7.0])


def install(module: nn.Module) -> None:
    """Let a module with Zigzag gate, up and down run as one call, if that is what its class computes."""
    if "_gated" in module.__dict__:
        return
    for names in GATED:
        kinds = [module.get(name) for name in names]
        if all(isinstance(kind, ZigzagLinear) for kind in kinds) and _is_gated(type(module), names):
            object.__setattr__(module, "_gated", Gated(module, names, type(module).__call__))
            module.__class__ = _traced(type(module))


@cache
def _traced(kind: type) -> type:
    """A subclass whose one-row calls go to the module's `Gated`."""

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        gated = self.__dict__.get("_gated")
        if gated is None or args or kwargs or x.size != x.shape[-1]:
            return kind.__call__(self, x, *args, **kwargs)
        return gated(x)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@cache
def _is_gated(kind: type, names: tuple[str, str, str]) -> bool:
    """Whether the class's own code gives down(silu(gate(x)) * up(x)), tried with numbers for layers."""
    gate, up, down = names
    factor = mx.arange(1.0, 1.0 + _TRIAL.size)
    layers = {gate: lambda x: x, up: lambda x: x * 0 + factor, down: lambda h: h + 1.0}
    try:
        found = kind.__call__(SimpleNamespace(**layers), _TRIAL)
        expected = nn.silu(_TRIAL) * factor + 1.0
        return bool(mx.allclose(found, expected, rtol=1e-5, atol=1e-5).item())
    except Exception:  # the class wants more of its module than three layers: others' code, any error
        return False


class Gated:
    """One module's call, prepared for its layers as they are; the module's own code where that can't be.

    So it is for a prompt of one row, too, where layers skip channels: prompts run dense.
    """

    def __init__(self, module: Any, names: tuple[str, str, str], original: Callable[..., mx.array]) -> None:
        self.module, self.names, self.original = module, names, original
        self._form: tuple[Any, ...] = ()
        self._parts = Parts([])
        self._step: interface.GatedStep | None = None
        self._groups: list[SharedInput] = []  # gate and up; down
        self._skips = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gated":
        """The same for the copied module; what was prepared belongs to the old one."""
        return Gated(copy.deepcopy(self.module, memo), self.names, self.original)

    def __call__(self, x: mx.array) -> mx.array:
        if (x.dtype, x.ndim) != self._form or not self._parts.unchanged():
            self._prepare(x)
        if self._step is None or (self._skips and not phase.decodes()):
            return self.original(self.module, x)
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
        self._parts = Parts([*((self.module, name) for name in self.names), *prepared.of_layers(layers)])
        if not all(isinstance(layer, ZigzagLinear) for layer in layers):
            return  # a profile's row-grouped layer, or a watched one
        gate, up, down = layers
        if [id(layer) for layer in gate._siblings.layers] == [id(gate), id(up)]:
            self._groups = [gate._siblings, down._siblings]
            self._skips = any(layer.threshold is not None for layer in layers)
            self._step = select.prepare_gated(x, [gate, up], down)
