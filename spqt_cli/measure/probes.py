"""Watching a model's Zigzag layers from inside: what enters them, what skipping would drop.

`probing` puts a Probe in each layer's place for as long as its block lasts, so no hook stays in the
layers. A Probe masks many rows at once, which is what decoding does to one row at a time; the prompt
of a window runs dense, as in generation. It knows nothing of text, methods or files.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.decode import foreign
from spqt_cli.decode.layers import ZigzagLayer, ZigzagLinear, put_layers, zigzag_layers
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import layout, thresholds
from spqt_cli.measure import many_rows


class Masking:
    """Thresholds to mask by, and how many inputs they masked. Layers left out, or at 0, stay dense."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """values: path -> threshold on |x|."""
        self._thresholds = {
            path: mx.array([value], mx.float32) for path, value in values.items() if value > 0
        }
        self._skipped: dict[str, mx.array] = {}
        self._seen: dict[str, int] = {}

    def apply(self, path: str, x: mx.array, rows: np.ndarray | None = None) -> mx.array:
        """x (..., inputs) with the layer's inactive channels set to zero, and counted.

        rows: (B, positions) booleans, True where a position is masked and counted; None: everywhere.
        Raises UnsupportedError where `rows` is given and the layer does not see rows of each position.
        """
        if rows is not None:
            rows = np.repeat(rows.reshape(-1), rows_of_each(path, x, rows.size))
        seen = x.size if rows is None else int(rows.sum()) * x.shape[-1]
        self._seen[path] = self._seen.get(path, 0) + seen
        threshold = self._thresholds.get(path)
        if threshold is None:
            return x
        inactive = layout.inactive(x, threshold)
        if rows is not None:
            inactive = inactive & mx.array(rows.reshape(*x.shape[:-1], 1))
        # float32 sums of whole numbers: exact per window, and off by under 1e-6 of the total
        skipped = inactive.sum().astype(mx.float32)
        self._skipped[path] = self._skipped[path] + skipped if path in self._skipped else skipped
        return mx.where(inactive, mx.array(0, x.dtype), x)

    def evaluate(self) -> None:
        """Compute the counts so far, so that they hold no arrays of the passes that made them."""
        mx.eval(self._skipped)

    def realised(self) -> dict[str, float]:
        """Path -> fraction of its inputs masked so far; only layers that ran."""
        skipped = {path: float(np.array(count)) for path, count in self._skipped.items()}
        return {path: skipped.get(path, 0.0) / seen for path, seen in self._seen.items() if seen}


class Harness:
    """What the probes of a model do: by default nothing; otherwise what an open context says."""

    def __init__(self, layers: dict[str, ZigzagLayer]) -> None:
        self.layers = layers
        self._sorted: _Sorted | None = None
        self._masking: tuple[Masking, np.ndarray | None] | None = None
        self._counter: _Counter | None = None
        self._slopes: Slopes | None = None

    @contextmanager
    def masked(self, masking: Masking | None, rows: np.ndarray | None = None) -> Iterator[None]:
        """Mask every layer's input here; None runs dense. rows: as in Masking.apply."""
        before, self._masking = self._masking, None if masking is None else (masking, rows)
        try:
            yield
        finally:
            self._masking = before

    @contextmanager
    def counting(self, first: int = 0, length: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Count the inputs of passes here. At the end the dict that this gives holds, for each layer that
        ran, path -> counts of |x| per bin: (BINS,), int64.

        first: positions at the beginning of a pass that are left out. length: positions of a pass; layers
        that don't see rows of each of them (experts in a list, recurrent cells) are counted whole.
        """
        found: dict[str, np.ndarray] = {}
        before, counter = self._counter, _Counter(first, length)
        self._counter = counter
        try:
            yield found
        finally:
            self._counter = before
        found.update(counter.histograms(self.layers))

    @contextmanager
    def differentiated(self) -> Iterator["Slopes"]:
        """Gather the input of each call here, and the gradient by it."""
        before, slopes = self._slopes, Slopes()
        self._slopes = slopes
        try:
            yield slopes
        finally:
            self._slopes = before

    def sorting(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """mlx-lm's `_gather_sort`, after which it is known which row belongs to which position."""

        def gather_sort(x: mx.array, indices: mx.array) -> Any:
            found = stock(x, indices)
            self._sorted = _Sorted(x, indices, *found)
            return found

        return gather_sort

    def watch_experts(self, path: str, x: mx.array, indices: mx.array) -> mx.array:
        """x (..., 1, inputs) of experts as they are to see it; watched in the order of positions, where
        mlx-lm has sorted its rows by expert.
        """
        known = self._sorted
        if known is None or indices is not known.chosen:
            return self.watch(path, x)
        order = mx.argsort(known.inverse)
        if x is known.rows:  # a position's row, once for each of its experts
            return self.watch(path, known.x).flatten(0, -3)[order // known.indices.shape[-1]]
        by_position = x[known.inverse].reshape(*known.indices.shape, *x.shape[-2:])
        return self.watch(path, by_position).flatten(0, -3)[order]

    def watch(self, path: str, x: mx.array) -> mx.array:
        """x (..., inputs) as the layer is to see it."""
        if self._counter is not None:
            self._counter.add(path, x)
        if self._slopes is not None:
            x = self._slopes.through(path, x)
        if self._masking is not None:
            masking, rows = self._masking
            x = masking.apply(path, x, rows)
        return x


class _Sorted(NamedTuple):
    """One call of mlx-lm's `_gather_sort`: what it was given, and what it returned."""

    x: mx.array
    indices: mx.array
    rows: mx.array
    chosen: mx.array
    inverse: mx.array


class _Counter:
    """Histograms of what enters the layers, one for siblings that share an input."""

    def __init__(self, first: int, length: int) -> None:
        self._first, self._length = first, length
        self._counts: dict[str, np.ndarray] = {}
        self._owner: dict[str, str] = {}  # a layer -> the sibling that counts their common input
        self._last: tuple[str, mx.array] | None = None

    def add(self, path: str, x: mx.array) -> None:
        if self._last is not None and self._last[1] is x:
            self._owner[path] = self._last[0]
            return
        self._last = (path, x)
        rows = x.reshape(-1, x.shape[-1])
        each = len(rows) // self._length if self._length and len(rows) % self._length == 0 else 0
        added = thresholds.histogram(rows[self._first * each :])
        self._counts[path] = self._counts[path] + added if path in self._counts else added

    def histograms(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        counts = self._counts
        owners = {path: path if path in counts else self._owner.get(path, path) for path in paths}
        return {path: counts[owner] for path, owner in owners.items() if owner in counts}


class Slopes:
    """What enters the layers in one differentiated pass, call by call, and the gradients by it.

    `origin` is what to differentiate by: a zero added to every layer's input, so that each is reached from
    it. Inputs may have any shape and number: whole sequences, single tokens, the rows of an expert.
    """

    def __init__(self) -> None:
        self.origin = mx.zeros(())
        self._calls: dict[str, list[tuple[mx.array, mx.array]]] = {}

    def through(self, path: str, x: mx.array) -> mx.array:
        """x, whose gradient is kept when it comes back."""

        @mx.custom_function
        def same(y: mx.array) -> mx.array:
            return y

        @same.vjp
        def back(y: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
            self._calls.setdefault(path, []).append((y, gradient))
            return gradient

        return cast(mx.array, same(x + self.origin.astype(x.dtype)))

    def pairs(self) -> Iterator[tuple[str, mx.array, mx.array]]:
        """(path, input, gradient) of every call that the result depends on."""
        for path, calls in self._calls.items():
            for x, gradient in calls:
                yield path, x, gradient

    def evaluate(self) -> None:
        mx.eval([*self._calls.values()])


def rows_of_each(path: str, x: mx.array, positions: int) -> int:
    """How many rows of x (..., inputs) each position has: one, or one for each expert that it is sent to.

    Raises UnsupportedError where a layer does not see all positions at once.
    """
    each, others = divmod(x.size // x.shape[-1], positions)
    if others or not each:
        raise UnsupportedError(
            f"layer {path} does not see all positions at once",
            "this model can't be calibrated block by block",
        )
    return each


class Probe(nn.Module):
    """A Zigzag layer with its harness: watches and masks x (..., inputs), multiplies densely."""

    def __init__(self, path: str, layer: ZigzagLayer, harness: Harness) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._harness = path, harness

    def __call__(
        self, x: mx.array, indices: mx.array | None = None, sorted_indices: bool = False
    ) -> mx.array:
        if indices is None:
            return many_rows.linear(self._harness.watch(self._path, x), self.layer)
        x = self._harness.watch_experts(self._path, x, indices)
        return many_rows.experts(x, indices, self.layer, sorted_indices)


@contextmanager
def probing(model: nn.Module) -> Iterator[Harness]:
    """Put a probe in place of every Zigzag layer in this block."""
    layers = zigzag_layers(model)
    harness = Harness(layers)
    put_layers(model, {path: Probe(path, layer, harness) for path, layer in layers.items()})
    try:
        with _remembering(harness):
            yield harness
    finally:
        put_layers(model, layers)


@contextmanager
def _remembering(harness: Harness) -> Iterator[None]:
    """Where a model has Zigzag experts, let the harness know how mlx-lm sorts their rows."""
    if all(isinstance(layer, ZigzagLinear) for layer in harness.layers.values()):
        yield
        return
    from mlx_lm.models import switch_layers

    with foreign.replaced([(switch_layers, "_gather_sort", harness.sorting(switch_layers._gather_sort))]):
        yield


@contextmanager
def unprobed(model: nn.Module, harness: Harness) -> Iterator[None]:
    """Put a probed model's own layers back for this block, and the probes again afterwards.

    Whatever stands in a layer's place at the end is dropped.
    """
    probes = [(path, module) for path, module in model.named_modules() if isinstance(module, Probe)]
    put_layers(model, harness.layers)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(probes))


def prompt_cache(model: nn.Module, tokens: mx.array) -> list[Any]:
    """The model's cache after a pass over `tokens` (B, length); the head is not computed."""
    cache = empty_cache(model)
    advance(model, tokens, cache)
    return cache


def empty_cache(model: nn.Module) -> list[Any]:
    """The model's cache before any token."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def advance(model: nn.Module, tokens: mx.array, cache: list[Any]) -> None:
    """Run `tokens` (B, length) through the model into `cache`; the head is not computed."""
    with many_rows.many_rows(heads=False):
        logits = model(tokens, cache=cache)
        mx.eval([entry.state for entry in cache])
    del logits  # never evaluated


def continuation(model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
    """The logits (B, length, vocab) of `tokens` after a cached prompt; the cache stays as it was."""
    with many_rows.many_rows():
        return model(tokens, cache=copy.deepcopy(cache))


def weighted(skipped: Mapping[str, float], layers: Mapping[str, ZigzagLayer]) -> float:
    """The fraction skipped of the Zigzag weights that a token reads. skipped: path -> fraction of the layer's
    inputs.
    """
    sizes = {path: layer.size for path, layer in layers.items()}
    return sum(skipped.get(path, 0.0) * size for path, size in sizes.items()) / sum(sizes.values())


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Calls of these modules go to hook(module, call, x, ...) here; `call` is their class's own code."""
    known = {id(module): module for module in modules}
    kinds: set[Any] = {type(module) for module in known.values()}  # classes whose calls are replaced
    running: set[int] = set()  # their own code: a fused block has two classes

    def through(call: Callable[..., Any]) -> Callable[..., Any]:
        first = list(inspect.signature(call).parameters)[1]

        def own(module: nn.Module, *given: Any, **named: Any) -> Any:
            running.add(id(module))
            try:
                return call(module, *given, **named)
            finally:
                running.discard(id(module))

        @functools.wraps(call)  # a hook inside this block asks for the signature again
        def ask(module: nn.Module, *given: Any, **named: Any) -> Any:
            if id(module) not in known or id(module) in running:
                return call(module, *given, **named)
            if first in named:  # GPT-J's blocks get their input by name
                given = (named.pop(first), *given)
            return hook(module, own, *given, **named)

        return ask

    with foreign.replaced([(kind, "__call__", through(kind.__call__)) for kind in kinds]):
        yield
