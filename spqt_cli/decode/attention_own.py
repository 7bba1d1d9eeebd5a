"""An attention module's own code between products that a fused step has computed and its last layer.

The code runs on a stand-in for the module, an object of its class with the same attributes and parts, in
which the projections hand out given products and `o_proj` hands its input back. The module is not touched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from spqt_cli.decode import foreign


class _Given:
    """Stands for a projection whose product of one array, `x`, is known; any other goes to the layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.x: mx.array | None = None
        self.product: Any = None

    def __call__(self, x: mx.array) -> Any:
        if x is not self.x:
            return self.layer(x)
        found, self.x, self.product = self.product, None, None
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Unchanged:
    """Stands for the last layer: what it is given is the result."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class OwnAttention:
    """The code of one attention module whose result is `o_proj(...)`, for its parts as they are now.

    projections: the Zigzag layers, parts of the module, whose products will be given.
    """

    def __init__(self, module: Any, projections: Sequence[Any]) -> None:
        self.module, self.projections = module, projections
        self.code: Callable[..., Any] = foreign.own_class(module).__call__
        self._stand_in: Any = dict.__new__(type(module))
        self._given = [_Given(layer) for layer in projections]
        by_layer = dict(zip(map(id, projections), self._given, strict=True))
        dict.update(self._stand_in, {name: by_layer.get(id(part), part) for name, part in module.items()})
        dict.update(self._stand_in, {"o_proj": _Unchanged(module["o_proj"])})
        object.__setattr__(self._stand_in, "__dict__", module.__dict__)  # one for both: settings may change

    def __call__(
        self,
        x: mx.array,
        products: Sequence[mx.array],
        mask: Any,
        cache: Any,
        code: Callable[..., Any] | None = None,
    ) -> mx.array:
        """What the module gives to `o_proj` for x, whose products these are.

        code: runs in the place of the class's own.
        """
        for given, product in zip(self._given, products, strict=True):
            given.x, given.product = x, product
        found: mx.array = (code or self.code)(self._stand_in, x, mask, cache)
        return found
