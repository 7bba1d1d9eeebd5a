"""The modules and arrays that a prepared step was made from, and whether they are still the same ones.

A profile, a calibration or a user may put other layers, weights or thresholds in at any time. A decode step
asks hundreds of times a token, so the question is a few dictionary lookups.
"""

from collections.abc import Iterable
from operator import is_
from typing import Any

import mlx.nn as nn

from spqt_cli.backends import select
from spqt_cli.decode.layers import ZigzagLinear

Place = tuple[dict[str, Any], str]  # where something is kept: a module, or its attributes, and a key


class Parts:
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
        if isinstance(layer, ZigzagLinear):
            select.arrange(layer._siblings.layers)


def of_layers(layers: Iterable[Any]) -> list[Place]:
    """The places of the weights and thresholds of those that are Zigzag layers."""
    zigzag = [layer for layer in layers if isinstance(layer, ZigzagLinear)]
    return [(layer, "weight") for layer in zigzag] + [(layer.__dict__, "_threshold") for layer in zigzag]


def within(module: Any) -> list[Place]:
    """The places of a module's arrays and parts, and of theirs where they are no Zigzag layers."""
    children = [value for value in module.values() if isinstance(value, nn.Module)]
    plain = [child for child in children if not isinstance(child, ZigzagLinear)]
    return [(holder, key) for holder in (module, *plain) for key in holder]
