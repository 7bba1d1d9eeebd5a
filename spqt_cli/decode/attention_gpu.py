"""A block's decode step on a GPU as two traced calls with no more than the attention product between them.

What lies around the product, heads, norms of them, rotary positions, is the same for every token but for the
position, so it is traced once with the position as an array: from the module's own code, or, where that is
rotary positions alone, by the reduction of q/k/v itself. The cache's update and the product change shape with
every token; they stay the cache's and mlx-lm's own calls.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from spqt_cli.backends import interface, select
from spqt_cli.backends.accuracy import close
from spqt_cli.decode import active_counts, foreign, recognize
from spqt_cli.decode.recognize import Block, Rope

Counts = Sequence[interface.Count]
PRODUCT = "scaled_dot_product_attention"  # as mlx-lm's models import it from their base module
POSITIONS = 256  # whose cosines and sines are made at one time


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

    It runs on a stand-in, an object of the module's class with the same attributes and parts, in which the
    projections hand out given products and `o_proj` hands its input back. The module is not touched.

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


class NotTraceable(Exception):
    """Why an attention's code can't be traced around its product."""


class TracedStep:
    """One block's step; it is taken once it has given what the block's own code gives.

    reason: why it is not taken; "" where it is, None before the first token.
    """

    def __init__(
        self,
        x: mx.array,
        block: Block,
        own: OwnAttention,
        front: interface.HeadStep,
        tail: interface.TailStep | interface.MiddleStep,
    ) -> None:
        self._own, self._front = own, front
        self._around = around = AroundProduct(own)
        self.reason: str | None = None
        self._position: Callable[[int], mx.array] = _as_array

        @mx.compile
        def before(
            x: mx.array, offset: mx.array, count: interface.Count
        ) -> tuple[list[mx.array], interface.Count]:
            normed, products, count = front(x, count)
            return around.before(normed, products, offset), count

        @mx.compile
        def after(attended: mx.array, x: mx.array, counted: Counts) -> tuple[Any, Counts]:
            return tail(around.after(attended), x, counted)

        self._before: interface.RotaryStep = before
        self._after = after
        if block.rope is not None:
            self._rotate_in_kernel(x, block, block.rope)

    def _rotate_in_kernel(self, x: mx.array, block: Block, rope: Rope) -> None:
        """Let the reduction of q/k/v rotate their heads, where the backend can."""
        module = self._own.module
        head = block.projections[0].outputs // module.n_heads
        rotary = interface.Rotary(head, rope.dims, traditional=bool(rope.traditional), rotated=2)
        if step := select.prepare_rotary(x, block.norm, block.projections, rotary):
            self._before, self._position = step, _table(frequencies(rope)).at
            self._around.settings = {"scale": module.scale}

    def step(self, x: mx.array, mask: None, cache: Any, counted: Counts) -> tuple[Any, Counts]:
        """What the tail gives for x, one row, and the counts after `counted`, of `Block.launches`."""
        (queries, keys, values), count = self._before(x, self._position(cache.offset), counted[0])
        attended = self._around.product(queries, keys, values, cache)
        y, counts = self._after(attended, x, counted[1:])
        return y, [count, *counts]

    def takes(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether a step with these can run so."""
        if mask is not None or type(getattr(cache, "offset", None)) is not int:
            return False
        if self.reason is None:
            try:
                mx.eval(x)
            except ValueError:  # within mx.compile or mx.grad
                return False
            with active_counts.counting():  # a trial is no step
                self.reason = self._fault(x, cache)
        return not self.reason

    def _fault(self, x: mx.array, cache: Any) -> str:
        """Why the step is not the block's own code, "" where it is; both work on copies of the cache."""
        if other := _watching(self._own.module):
            return other
        try:
            normed, products, _ = self._front(x, None)
            expected = self._around.traced(normed, products, mx.array(cache.offset))[0]
            found, _ = self._before(x, self._position(cache.offset), None)
            if not all(close(a, b) for a, b in zip(found, expected, strict=True)):
                return "its queries, keys and values differ from those of its own code"
            queries, keys, values = found
            attended = self._around.product(queries, keys, values, copy.deepcopy(cache))
            own = self._own(normed, products, None, copy.deepcopy(cache))
            right = close(self._around.after(attended), own)
            return "" if right else "after the product it uses more than the product"
        except NotTraceable as why:
            return str(why)
        except Exception as error:  # code of others, which may have any other form
            return f"its code can't be run on stand-ins ({type(error).__name__}: {error})"


class AroundProduct:
    """An attention module's own code before and after its product with the cache; for one token.

    settings: what the code gives the product besides arrays, cache and mask, known after `before`.
    """

    def __init__(self, own: OwnAttention) -> None:
        self._own = own
        self._names = getattr(own.code, "__globals__", {})
        self.settings: dict[str, Any] = {}

    def before(self, x: mx.array, products: list[mx.array], offset: mx.array) -> list[mx.array]:
        """Queries, and the keys and values that join the cache, at position offset (); keeps the settings.

        x: (1, 1, dims); products: of it, by the projections. Raises NotTraceable for code of another form.
        """
        given, self.settings = self.traced(x, products, offset)
        return given

    def traced(
        self, x: mx.array, products: list[mx.array], offset: mx.array
    ) -> tuple[list[mx.array], dict[str, Any]]:
        """As `before`, and the product's other settings."""
        calls: list[tuple[mx.array, mx.array, mx.array, dict[str, Any]]] = []
        cache = _Position(offset)

        def product(q: mx.array, k: mx.array, v: mx.array, **settings: Any) -> mx.array:
            calls.append((q, k, v, settings))
            return mx.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)  # nothing that follows is used

        self._own(x, products, None, cache, self._with_product(product))
        if len(calls) != 1:
            raise NotTraceable(f"it calls {PRODUCT} {len(calls)} times")
        queries, keys, values, settings = calls[0]
        if cache.kept is None or keys is not cache.kept[0] or values is not cache.kept[1]:
            raise NotTraceable("its product is not of the keys and values that the cache gives")
        if settings.pop("cache", None) is not cache or settings.pop("mask", cache) is not None:
            raise NotTraceable("its product takes another cache or mask")
        return [queries, keys, values], settings

    def product(self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any) -> mx.array:
        """What the product gives once keys and values have joined the cache."""
        keys, values = cache.update_and_fetch(keys, values)
        found: mx.array = self._names[PRODUCT](queries, keys, values, cache=cache, mask=None, **self.settings)
        return found

    def after(self, attended: mx.array) -> mx.array:
        """What the module gives to `o_proj` for a product."""
        layers = self._own.projections
        x = mx.zeros((1, 1, layers[0].inputs), attended.dtype)  # what comes of x and its products is not used
        products = [mx.zeros((1, 1, layer.outputs), attended.dtype) for layer in layers]
        code = self._with_product(lambda *_, **__: attended)
        return self._own(x, products, None, _Position(mx.array(0)), code)

    def _with_product(self, product: Callable[..., mx.array]) -> Callable[..., Any]:
        """The class's code with another function under the product's name; the class is not touched."""
        code: Any = self._own.code
        if PRODUCT not in self._names:
            raise NotTraceable(f"its module has no {PRODUCT}")
        names = {**self._names, PRODUCT: product}
        made = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        made.__kwdefaults__ = code.__kwdefaults__
        return made


class _Position:
    """Stands for a cache while code is traced: it has a position and keeps what it is given."""

    def __init__(self, offset: mx.array) -> None:
        self.offset = offset
        self.kept: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.kept = keys, values
        return self.kept


class PositionTable:
    """Cosines of a head's angles, then sines, (dims,) float32, by position.

    They are made with MLX for many positions at once: a kernel's own sines would differ between machines.
    frequencies: radians per position of each pair, (dims / 2,).
    """

    def __init__(self, frequencies: tuple[float, ...]) -> None:
        self.frequencies = mx.array(frequencies, dtype=mx.float32)
        self._first = -POSITIONS
        self._rows: list[mx.array] = []

    def at(self, offset: int) -> mx.array:
        """The cosines and sines of one position."""
        row = offset - self._first
        if not 0 <= row < POSITIONS:
            self._first, row = offset - offset % POSITIONS, offset % POSITIONS
            positions = mx.arange(self._first, self._first + POSITIONS, dtype=mx.float32)
            angles = positions[:, None] * self.frequencies
            table = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=1)
            self._rows = [one.reshape(-1) for one in mx.split(table, POSITIONS)]
            mx.eval(self._rows)
        return self._rows[row]


def frequencies(rope: Rope) -> tuple[float, ...]:
    """Radians per position of each pair of a head's channels, (dims / 2,)."""
    if rope.freqs is None:
        assert rope.base is not None
        per_position = float(rope.base) ** (-np.arange(0, rope.dims, 2) / rope.dims)
    else:
        per_position = 1.0 / np.array(rope.freqs.astype(mx.float32)).astype(np.float64)
    return tuple((rope.scale * per_position).tolist())


@cache
def _table(frequencies: tuple[float, ...]) -> PositionTable:
    """One object for all blocks that rotate alike: a step then looks its position up once."""
    return PositionTable(frequencies)


@lru_cache(maxsize=1)
def _as_array(offset: int) -> mx.array:
    """A position as an array, (), int32: one for all blocks of a step."""
    return mx.array(offset)


def _watching(attention: nn.Module) -> str:
    """Which parts of an attention module are neither MLX's, mlx-lm's nor Zigzag layers; "" where none is.

    A trace asks a part once and never again, so one that watches or counts its calls must stay untraced.
    """
    others = [
        type(part).__name__
        for part in attention.values()
        if isinstance(part, nn.Module)
        and not recognize.is_zigzag(part)
        and type(part).__module__.partition(".")[0] not in ("mlx", "mlx_lm")
    ]
    return f"its {others[0]} may watch its calls" if others else ""
