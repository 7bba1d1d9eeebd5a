"""An attention module's own code in two halves, before and after its product with the cache.

What lies around the product, heads, norms of them, rotary positions, is the same for every token but for the
position, so it can be traced once with the position as an array. The cache's update and the product itself
change shape with every token; they stay the cache's and mlx-lm's own calls.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

PRODUCT = "scaled_dot_product_attention"  # as mlx-lm's models import it from their base module


class CannotCut(Exception):
    """The module's code has another form."""


class _Reached(Exception):
    """The product was asked for; what it was to be given."""

    def __init__(self, queries: mx.array, keys: mx.array, values: mx.array, settings: dict[str, Any]) -> None:
        self.given, self.settings = (queries, keys, values), settings


class _Room:
    """Stands for a cache while the code around it is traced: it has a position and keeps what it is given."""

    def __init__(self, offset: mx.array) -> None:
        self.offset = offset
        self.kept: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.kept = keys, values
        return self.kept


class Halves:
    """The halves of one attention module whose result is `o_proj(...)`; for one token.

    Raises CannotCut when used, where the module's code can't be cut.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.own = type(module).__call__
        self.names = getattr(self.own, "__globals__", {})
        self.settings: dict[str, Any] = {}

    def before(self, x: mx.array, products: list[mx.array], offset: mx.array) -> list[mx.array]:
        """Queries, and the keys and values that join the cache, at position offset (); keeps the settings.

        x: (1, 1, dims); products: of it, by `q_proj` and those that share its input.
        """
        given, self.settings = self.traced(x, products, offset)
        return given

    def traced(
        self, x: mx.array, products: list[mx.array], offset: mx.array
    ) -> tuple[list[mx.array], dict[str, Any]]:
        """As `before`, and the product's other settings."""
        self.module["q_proj"]._siblings.offer(x, products)
        room = _Room(offset)

        def product(queries: mx.array, keys: mx.array, values: mx.array, **settings: Any) -> mx.array:
            raise _Reached(queries, keys, values, settings)

        try:
            with self._product(product):
                self.own(self.module, x, None, room)
        except _Reached as reached:
            queries, *pair = reached.given
            settings = {**reached.settings}
        else:
            raise CannotCut("no product to cut at")
        plain = settings.pop("cache", None) is room and settings.pop("mask", room) is None
        if not plain or room.kept is None or any(a is not b for a, b in zip(pair, room.kept, strict=True)):
            raise CannotCut("no product to cut at")
        return [queries, *room.kept], settings

    def product(self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any) -> mx.array:
        """What the product gives once keys and values have joined the cache."""
        keys, values = cache.update_and_fetch(keys, values)
        return self.names[PRODUCT](queries, keys, values, cache=cache, mask=None, **self.settings)

    def after(self, attended: mx.array) -> mx.array:
        """What the module gives to `o_proj` for a product."""
        shared = self.module["q_proj"]._siblings
        x = mx.zeros((1, 1, shared.layers[0].inputs), attended.dtype)  # what comes of it is not used
        shared.offer(x, [mx.zeros((1, 1, layer.outputs), attended.dtype) for layer in shared.layers])
        out = self.module["o_proj"]._siblings
        out.postponed = True
        try:
            with self._product(lambda *_, **__: attended):
                return self.own(self.module, x, None, _Room(mx.array(0)))
        finally:
            out.postponed = False

    @contextmanager
    def _product(self, stand_in: Callable[..., mx.array]) -> Iterator[None]:
        kept = self.names.get(PRODUCT)
        if kept is None:
            raise CannotCut("no product to cut at")
        thread = threading.get_ident()

        def here(*args: Any, **settings: Any) -> mx.array:  # another thread may be decoding meanwhile
            return (stand_in if threading.get_ident() == thread else kept)(*args, **settings)

        self.names[PRODUCT] = here
        try:
            yield
        finally:
            self.names[PRODUCT] = kept
