"""Calls of a module that a prepared step answers, as long as what the step was made from is still there.

A profile, a calibration or a user may put other layers, weights or thresholds in at any time. A decode step
asks hundreds of times a token, so the question is a few dictionary lookups.
"""

from collections.abc import Callable, Iterable
from functools import cache
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import select
from spqt_cli.decode import foreign
from spqt_cli.decode.recognize import is_zigzag

Place = tuple[dict[str, Any], str]  # where something is kept: a module, or its attributes, and a key


def answer_calls(module: nn.Module, attribute: str, step: Callable[..., mx.array | None]) -> None:
    """Let `step` answer the one-row calls of `module`; where it gives None, the module's own code does.

    attribute: under which the module keeps the step, so that others find it.
    """
    object.__setattr__(module, attribute, step)
    foreign.change_class(module, _asking(attribute), computes_the_same=True)


@cache
def _asking(attribute: str) -> Callable[[Any], Callable[..., Any]]:
    def make_call(kind: Any) -> Callable[..., Any]:
        def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            step = self.__dict__.get(attribute)
            if step is not None and x.size == x.shape[-1]:
                y = step(x, *args, **kwargs)
                if y is not None:
                    return y
            return kind.__call__(self, x, *args, **kwargs)

        return call

    return make_call


class Sources:
    """What lay at some places when this was made."""

    def __init__(self, places: Iterable[Place]) -> None:
        places = list(places)
        self._holders = [holder for holder, _ in places]
        self._keys = [key for _, key in places]
        self._known = list(map(dict.get, self._holders, self._keys))

    def unchanged(self) -> bool:
        """Whether the very same things lie there now."""
        return all(map(is_, map(dict.get, self._holders, self._keys), self._known))


def arrange(layers: Iterable[Any]) -> None:
    """Let the backend lay the Zigzag layers' weights out, before their arrays are remembered."""
    for layer in layers:
        if is_zigzag(layer):
            select.arrange(layer.shared_input.layers)


def of_layers(layers: Iterable[Any]) -> list[Place]:
    """The places of the weights and thresholds of those that are Zigzag layers."""
    zigzag = [layer for layer in layers if is_zigzag(layer)]
    return [(layer, "weight") for layer in zigzag] + [(layer.__dict__, "_threshold") for layer in zigzag]


def within(module: Any) -> list[Place]:
    """The places of a module's arrays and parts, and of theirs where they are no Zigzag layers."""
    children = [value for value in module.values() if isinstance(value, nn.Module)]
    plain = [child for child in children if not is_zigzag(child)]
    return [(holder, key) for holder in (module, *plain) for key in holder]
