"""Watching a model's Zigzag layers from inside: what enters them, what skipping would drop.

`probing` puts a Probe in each layer's place for as long as its block lasts, so no hook stays in the
layers. A Probe masks many rows at once, which is what decoding does to one row at a time; the prompt
of a window runs dense, as in generation. It knows nothing of text, methods or files.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli import blas, layout, thresholds
from spqt_cli.layers import ZigzagLinear
from spqt_cli.patch import zigzag_layers


class Harness:
    """What all probes of a model share: switches to set, sums to read.

    sparse: mask inputs by `set_thresholds`. counting: add every input to the histograms.
    first: positions at the start of a sequence left out of the histograms. shifts: path -> an array
    added to that layer's input, to differentiate by.
    """

    def __init__(self, layers: dict[str, ZigzagLinear]) -> None:
        self.layers = layers
        self.sparse = self.counting = False
        self.first = 0
        self.shifts: dict[str, mx.array] | None = None
        self.inputs: dict[str, mx.array] | None = None  # filled per layer when it is a dict
        self._thresholds: dict[str, mx.array] = {}
        self._counts: dict[str, mx.array] = {}
        self._owner: dict[str, str] = {}  # a layer -> the sibling that counts their common input
        self._last: tuple[str, mx.array] | None = None
        self._skipped: dict[str, mx.array] = {}
        self._seen: dict[str, int] = {}

    def set_thresholds(self, values: Mapping[str, float]) -> None:
        """The thresholds of the sparse switch; layers left out stay dense. Resets `realised`."""
        self._thresholds = {
            path: mx.array([value], mx.float32) for path, value in values.items() if value > 0
        }
        self._skipped, self._seen = {}, {}

    def count(self, path: str, x: mx.array) -> None:
        if self._last is not None and self._last[1] is x:
            self._owner[path] = self._last[0]
            return
        self._last = (path, x)
        added = thresholds.histogram(x[:, self.first :])
        self._counts[path] = self._counts[path] + added if path in self._counts else added

    def mask(self, path: str, x: mx.array) -> mx.array:
        self._seen[path] = self._seen.get(path, 0) + x.size
        threshold = self._thresholds.get(path)
        if threshold is None:
            return x
        inactive = layout.inactive(x, threshold)
        self._skipped[path] = self._skipped.get(path, mx.array(0.0)) + inactive.sum().astype(mx.float32)
        return mx.where(inactive, mx.array(0, x.dtype), x)

    def evaluate(self) -> None:
        """Compute what is pending, and let go of the last input."""
        self._last = None
        mx.eval(self._counts, self._skipped)

    def histograms(self, reset: bool = False) -> dict[str, np.ndarray]:
        """Path -> counts of |x| per bin since the start (or the last reset): (BINS,), int64."""
        self.evaluate()
        own = {path: np.array(counts).astype(np.int64) for path, counts in self._counts.items()}
        result = {
            path: own[self._owner.get(path, path)]
            for path in self.layers
            if self._owner.get(path, path) in own
        }
        if reset:
            self._counts = {}
        return result

    def realised(self) -> dict[str, float]:
        """Path -> share of its inputs masked since `set_thresholds`; only layers that ran sparse."""
        self.evaluate()
        return {path: np.array(self._skipped[path]).item() / seen if path in self._skipped else 0.0
                for path, seen in self._seen.items()}  # fmt: skip


class Probe(nn.Module):
    """A Zigzag layer with its harness: watches and masks x (B, rows, inputs), multiplies densely."""

    def __init__(self, path: str, layer: ZigzagLinear, harness: Harness) -> None:
        super().__init__()
        self.layer = layer
        self._path, self._harness = path, harness

    def __call__(self, x: mx.array) -> mx.array:
        harness, path = self._harness, self._path
        if harness.counting:
            harness.count(path, x)
        if harness.shifts is not None:
            if harness.inputs is not None:
                harness.inputs[path] = x
            x = x + harness.shifts[path]
        if harness.sparse:
            x = harness.mask(path, x)
        return blas.linear(x, self.layer)


@contextmanager
def probing(model: nn.Module) -> Iterator[Harness]:
    """Put a probe in place of every Zigzag layer in this block."""
    layers = zigzag_layers(model)
    harness = Harness(layers)
    probes = [(path, Probe(path, layer, harness)) for path, layer in layers.items()]
    model.update_modules(tree_unflatten(probes))
    try:
        yield harness
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))


def prompt_cache(model: nn.Module, tokens: mx.array) -> list[Any]:
    """The model's cache after a pass over `tokens` (B, length); the head is not computed."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    advance(model, tokens, cache)
    return cache


def advance(model: nn.Module, tokens: mx.array, cache: list[Any]) -> None:
    """Run `tokens` (B, length) through the model into `cache`; the head is not computed."""
    with blas.many_rows(heads=False):
        logits = model(tokens, cache=cache)
        mx.eval([entry.state for entry in cache])
    del logits  # never evaluated


def continuation(model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
    """The logits (B, length, vocab) of `tokens` after a cached prompt; the cache stays as it was."""
    with blas.many_rows():
        return model(tokens, cache=copy.deepcopy(cache))


def weighted(shares: Mapping[str, float], layers: Mapping[str, ZigzagLinear]) -> float:
    """The share of all Zigzag weights skipped, from each layer's share of inputs skipped."""
    sizes = {path: layer.inputs * layer.outputs for path, layer in layers.items()}
    return sum(shares.get(path, 0.0) * size for path, size in sizes.items()) / sum(sizes.values())
