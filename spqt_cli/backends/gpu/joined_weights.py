"""The weights of a launch as one array: MLX spends host time on every array of every launch.

A layer keeps its three arrays; they become views of the shared one. It knows layers only through
`interface.Projection`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from spqt_cli.backends.interface import Projection

LINE = 128  # bytes; each array begins at a multiple, so that lines are touched as before and loads are wide


class Kept(dict[Any, Any]):
    """What the GPU kernels keep with a layer: its place in a joined array, and plans by form and shape.

    A copy of the layer begins with nothing: what is kept holds the arrays of the old one.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return Kept()


def kept(layer: Any) -> Kept:
    """What is kept with a layer."""
    found: Kept = layer.__dict__.setdefault("_gpu", Kept())
    return found


class Joined(NamedTuple):
    """Where a layer's arrays lie. words: (any,) uint32; starts: of weight, scales and biases, in words."""

    words: mx.array
    starts: tuple[int, ...]
    arrays: tuple[mx.array, ...]  # the layer's own, views of words


def join(layers: Sequence[Projection]) -> list[Joined]:
    """One array for these layers' weights, scales and biases, made once; each layer's entry.

    The layers' own arrays are replaced by equal ones, so whoever remembers them must ask afterwards.
    """
    known = [_joined(layer) for layer in layers]
    first = known[0]
    if first and all(one and one.words is first.words for one in known):
        return [one for one in known if one]
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
        kept(layer).clear()  # plans would keep what the arrays were before
        kept(layer)["joined"] = found[-1]
    return found


def _joined(layer: Any) -> Joined | None:
    """A layer's entry, while its arrays are those that it speaks of."""
    entry: Joined | None = kept(layer).get("joined")
    same = entry and all(a is b for a, b in zip(entry.arrays, _arrays(layer), strict=True))
    return entry if same else None


def _arrays(layer: Projection) -> Iterable[mx.array]:
    return layer.weight, layer.scales, layer.biases


def _words(array: mx.array) -> mx.array:
    """An array's bytes as whole lines of uint32."""
    flat = array.reshape(-1)
    missing = -array.size % (LINE // array.itemsize)
    return mx.pad(flat, (0, missing)).view(mx.uint32) if missing else flat.view(mx.uint32)
