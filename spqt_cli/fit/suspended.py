"""A block that runs up to each of its layers and waits there, while others of its kind run as far.

So the inputs of a layer are there for all texts at once, and nothing is computed twice. Greenlets switch
inside one thread: MLX's streams belong to a thread.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from greenlet import GreenletExit, getcurrent, greenlet
from mlx import nn
from mlx.utils import tree_unflatten


class Suspended:
    """A call of `run` with hidden states, stopped wherever a tapped layer is called.

    path, x: of the layer that waits for its product; path is None at the end, where `result` is there.
    """

    def __init__(self, run: Callable[[mx.array], mx.array], states: mx.array) -> None:
        self.path: str | None = None
        self.x = self.result = states
        self._ready: dict[str, mx.array] = {}
        self._greenlet = greenlet(run)
        self._greenlet.tapped = self
        self._take(self._greenlet.switch(states))

    def go_on(self, products: dict[str, mx.array]) -> None:
        """Hand over what the waiting layer makes of x, and others of the same input, and run on."""
        y = products.pop(cast(str, self.path))
        self._ready = products
        self._take(self._greenlet.switch(y))

    def close(self) -> None:
        """End a call that nobody will finish."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)
        self._greenlet.tapped = None

    def ask(self, path: str, x: mx.array) -> mx.array:
        """The product of a layer that is called inside: at once if it is ready, else after a wait."""
        if x is self.x and path in self._ready:
            return self._ready.pop(path)
        mx.eval(x)
        return cast(mx.array, self._greenlet.parent.switch((path, x)))

    def _take(self, given: Any) -> None:
        if self._greenlet.dead:
            self.path, self.x, self.result = None, given, given
            mx.eval(given)
            self._greenlet.tapped = None  # no circle: these arrays are not to wait for the collector
        else:
            self.path, self.x = given


class _Tap(nn.Module):
    """Stands in a layer's place; inside a Suspended its products come from there."""

    def __init__(self, path: str, outputs: int) -> None:
        super().__init__()
        self._path, self._outputs = path, outputs

    def __call__(self, x: mx.array) -> mx.array:
        inside: Suspended | None = getattr(getcurrent(), "tapped", None)
        if inside is None:  # a block is only looked at
            return mx.zeros((*x.shape[:-1], self._outputs), x.dtype)
        return inside.ask(self._path, x)


def tap(model: nn.Module, outputs: dict[str, int]) -> None:
    """Put taps in the place of layers. outputs: path -> how many the layer has."""
    model.update_modules(tree_unflatten([(path, _Tap(path, count)) for path, count in outputs.items()]))
