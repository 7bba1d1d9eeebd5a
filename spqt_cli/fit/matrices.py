"""The matrices of a converted model whose groups can be moved, some of them unpacked.

One block's are unpacked at a time, for as long as it is worked on; packed ones are held where all are small.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx

from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.fit import products
from spqt_cli.fit.affine import LEAST_SPREAD, Groups
from spqt_cli.measure import many_rows
from spqt_cli.measure.many_rows import host

FACTOR, OFFSET = "factor", "offset"


class Matrices:
    """layers: path -> layer. values: name -> what is trained, set from outside.

    rounded_to: tensor -> dtype that scales and biases are rounded to; one left out is not.
    """

    def __init__(self, layers: dict[str, ZigzagLinear], *, hold: bool) -> None:
        """hold: keep the groups of every layer that was asked for."""
        self.layers = layers
        self.values: dict[str, mx.array] = {}
        self.rounded_to: Mapping[str, mx.Dtype] = {}
        self._hold = hold
        self._groups: dict[str, Groups] = {}
        self._unpacked: dict[str, Any] = {}

    def start(self, paths: Iterable[str]) -> dict[str, mx.array]:
        """The values of layers that leave them as they are."""
        shapes = {path: self.layers[path]["scales"].shape for path in paths}
        return {f"{path}.{kind}": mx.zeros(shapes[path]) for path in shapes for kind in (FACTOR, OFFSET)}

    def unpack(self, paths: Iterable[str], each: Callable[[list[Callable[[], Any]]], list[Any]]) -> None:
        """Have the matrices of layers ready. each: calls functions, in any order, for their results."""
        missing = [path for path in paths if path not in self._unpacked]
        found = each([self._unpacking(path, *self.affine(path)) for path in missing])
        self._unpacked |= dict(zip(missing, found, strict=True))

    def weight(self, path: str) -> Any:
        """A layer's matrix (bands, inputs, band) float32 with its groups moved, of numpy on the CPU."""
        if path not in self._unpacked:
            self._unpacked[path] = self._unpacking(path, *self.affine(path))()
        return self._unpacked[path]

    def affine(self, path: str) -> tuple[mx.array, mx.array]:
        """Scales and biases (bands, inputs, groups) float32 of a layer."""
        named = (self.values[f"{path}.{kind}"] for kind in (FACTOR, OFFSET))
        scales, biases = self._moved_from(path).moved(*named)
        dtype = self.rounded_to.get(f"{path}.scales", mx.float32)
        return scales.astype(dtype).astype(mx.float32), biases.astype(dtype).astype(mx.float32)

    def slopes(self, path: str, sums: Any, dots: Any) -> dict[str, Any]:
        """The slopes by what moves a layer's groups: (bands, inputs, groups) each.

        sums, dots: of the slopes by a group's values, and of their products with these.
        """
        factor, offset = (native(self.values[f"{path}.{kind}"]) for kind in (FACTOR, OFFSET))
        by_offset = native(self._moved_from(path).spread) * sums
        return {FACTOR: (dots - offset * by_offset) / (1 + factor), OFFSET: by_offset}

    def free(self) -> None:
        """Let go of matrices, and of groups if they are not held."""
        self._unpacked.clear()
        if not self._hold:
            self._groups.clear()

    def _unpacking(self, path: str, scales: mx.array, biases: mx.array) -> Callable[[], Any]:
        layer = self.layers[path]
        settle(layer.weight, scales, biases)
        return lambda: products.unpacked(layer.weight, scales, biases, layer.bits, layer.group_size)

    def _moved_from(self, path: str) -> Groups:
        if path not in self._groups:
            layer = self.layers[path]
            scales, biases = (layer[part].astype(mx.float32) for part in ("scales", "biases"))
            w = mx.array(self._unpacking(path, scales, biases)()).reshape(*scales.shape, layer.group_size)
            spread = mx.maximum(mx.sqrt(mx.var(w, axis=-1, ddof=1)), LEAST_SPREAD)
            settle(spread)
            self._groups[path] = Groups(scales, biases, spread)
        return self._groups[path]


def settle(*arrays: Any) -> None:
    """Compute what other threads will use, which belongs to this thread before.

    Twice, since a computed array still has the event of its computation, and whoever asks for its values
    next lets go of that: two threads at once might.
    """
    mx.eval(*arrays)
    mx.eval(*arrays)


def native(a: mx.array) -> Any:
    """a in float32, as numpy on the CPU."""
    return host(a) if many_rows.on_cpu() else a.astype(mx.float32)
