"""What the GPU backend keeps with a layer, and the weights of a launch as one array.

MLX spends host time on every array of every launch. A layer keeps its three arrays; they become views of
the shared one. Layers are known only as `interface.Projection`s.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from spqt_cli.backends.interface import Projection

LINE = 128  # bytes; each array begins at a multiple, so that lines are touched as before and loads are wide


class Joined(NamedTuple):
    """Where a layer's arrays lie. words: (any,) uint32; starts: of weight, scales and biases, in words."""

    words: mx.array
    starts: tuple[int, ...]
    arrays: tuple[mx.array, ...]  # the layer's own, views of words

    def still_holds(self, layer: Projection) -> bool:
        """Whether the layer's arrays are those that this speaks of."""
        return all(one is other for one, other in zip(self.arrays, _arrays(layer), strict=True))


class Kept:
    """All that the GPU backend keeps with a layer, in one place: its arrays' place, and plans by call.

    A plan holds arrays, so plans go when the layer's arrays move. A copy of the layer begins with nothing.
    """

    def __init__(self) -> None:
        self.joined: Joined | None = None
        self.plans: dict[Any, Any] = {}

    def move(self, joined: Joined) -> None:
        """The layer's arrays lie elsewhere from now on."""
        self.joined = joined
        self.plans.clear()

    def forget(self) -> None:
        """As for a layer that was never used."""
        self.joined = None
        self.plans.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return Kept()


def kept(layer: Any) -> Kept:
    """What is kept with a layer."""
    found: Kept = layer.__dict__.setdefault("_gpu", Kept())
    return found


def join(layers: Sequence[Projection]) -> list[Joined]:
    """One array for these layers' weights, scales and biases, made once; each layer's entry.

    The layers' own arrays are replaced by equal ones, so whoever remembers them must ask afterwards.
    """
    known = [kept(layer).joined for layer in layers]
    held = [one for one, layer in zip(known, layers, strict=True) if one and one.still_holds(layer)]
    if len(held) == len(layers) and all(one.words is held[0].words for one in held):
        return held
    arrays = [array for layer in layers for array in _arrays(layer)]
    pieces = [_words(array) for array in arrays]
    words = mx.concatenate(pieces)
    mx.eval(words)
    views, starts, begun = [], [], 0
    for array, piece in zip(arrays, pieces, strict=True):
        view = words[begun : begun + piece.size].view(array.dtype)[: array.size].reshape(array.shape)
        views.append(view)
        starts.append(begun)
        begun += piece.size
    mx.eval(views)
    found = []
    for i, layer in enumerate(layers):
        own = slice(3 * i, 3 * i + 3)
        found.append(Joined(words, tuple(starts[own]), tuple(views[own])))
        layer.weight, layer.scales, layer.biases = views[own]
        kept(layer).move(found[-1])
    return found


def _arrays(layer: Projection) -> Iterable[mx.array]:
    return layer.weight, layer.scales, layer.biases


def _words(array: mx.array) -> mx.array:
    """An array's bytes as whole lines of uint32."""
    flat = array.reshape(-1)
    missing = -array.size % (LINE // array.itemsize)
    return mx.pad(flat, (0, missing)).view(mx.uint32) if missing else flat.view(mx.uint32)
