"""A converted model whose groups and norms can be moved: passes of its blocks with masks on, and slopes.

It knows no optimizer and no files but the model's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate.stream.blocks import weights_bytes
from spqt_cli.decode import session
from spqt_cli.decode.layers import linear_layers
from spqt_cli.decode.session import Loaded
from spqt_cli.fit.lane import PROMPTS, Lane, Taking, norms, put
from spqt_cli.fit.lanes import Lanes
from spqt_cli.fit.matrices import Matrices, settle
from spqt_cli.measure import blas, many_rows

HELD_BYTES = {"cpu": 256 << 20, "gpu": 16 << 30}  # of packed weights: models above are read block by block
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 1 << 30}  # of a layer's activations: texts that pass together

KEPT_BYTES = {"cpu": 192 << 20, "gpu": 8 << 30}  # of products that need not be computed again
NOTHING: Mapping[str, float] = {}


class Student:
    """The model. values: name -> what is trained, of each block's layers and norms; set from outside.

    prompt: tokens of a text before decode steps. thresholds: path -> on |x|, of layers that skip in these;
    one left out is dense.
    """

    def __init__(self, loaded: Loaded, window: int) -> None:
        """loaded: lazily. window: tokens of a text, even."""
        self.window, self.prompt = window, window // PROMPTS
        self.layers = linear_layers(loaded.model)
        self._folder = loaded.folder
        self._kind = "cpu" if many_rows.on_cpu() else "gpu"
        self._holds = weights_bytes(loaded.folder.path) <= HELD_BYTES[self._kind]
        self.matrices = Matrices(self.layers, hold=self._holds)
        first = Lane(loaded, self.layers, window, self.matrices)
        self.blocks, self.norms, self.walk = first.blocks, first.norms, first.walk
        self._lanes = Lanes(first)
        inside = tuple(f"{block.name}." for block in self.blocks)
        self.last_norms = {
            name: module for name, module in norms(loaded.model, "").items() if not name.startswith(inside)
        }
        self.thresholds: dict[str, float] = {}

    @property
    def values(self) -> dict[str, mx.array]:
        """What is trained of the part at hand."""
        return self.matrices.values

    @values.setter
    def values(self, values: dict[str, mx.array]) -> None:
        self.matrices.values = values

    def start(self, number: int) -> dict[str, mx.array]:
        """The values of a block that leave it as it is."""
        return self.matrices.start(self.blocks[number].paths) | _weights_of(self.norms[number])

    def start_of_last_norms(self) -> dict[str, mx.array]:
        """The values of norms behind the blocks that leave them as they are."""
        return _weights_of(self.last_norms)

    @contextmanager
    def side_by_side(self, texts: int) -> Iterator[int]:
        """In this block so many texts pass at a time where the device is the CPU and BLAS has as many
        threads; it gives how many do.
        """
        count = min(texts, blas.threads()) if many_rows.on_cpu() else 1
        with self._lanes.several(count, self._another_lane):
            yield count

    def _another_lane(self) -> Lane:
        loaded = session.load_lazily(self._folder)
        return Lane(loaded, linear_layers(loaded.model), self.window, self.matrices)

    def chunks(self, texts: int) -> list[slice]:
        """Which of so many texts pass a block together."""
        widest = max(max(layer.inputs, layer.outputs) for layer in self.layers.values())
        size = max(1, CHUNK_BYTES[self._kind] // (4 * self.window * widest))
        size = min(size, -(-texts // len(self._lanes)))
        return [slice(i, i + size) for i in range(0, texts, size)]

    def embedded(self, tokens: np.ndarray) -> mx.array:
        """What enters the first block, float32, for tokens (texts, window)."""
        h = self.walk.embedded(tokens).astype(mx.float32)
        settle(h)
        return h

    def forward(
        self, number: int, h: mx.array, *, shares: Mapping[str, float] = NOTHING, keep: bool = False
    ) -> mx.array:
        """States (texts, window, width) after a block.

        shares: path -> that of inputs for which a layer's threshold is set on the way, from these texts.
        keep: `backward` will be called for the same texts.
        """
        chunks = [slice(0, len(h))] if shares else self.chunks(len(h))
        keeping = self._worth_keeping(len(h)) if keep else frozenset()
        settle(h)
        with self._at(number, settling=shares, keeping=keeping):
            found = self._lanes.run([partial(Lane.forward, number=number, texts=c, h=h) for c in chunks])
        whole = mx.concatenate(found)
        mx.eval(whole)
        return whole

    def _worth_keeping(self, texts: int) -> frozenset[str]:
        """The layers whose products for so many texts save most work for their size, as many as fit."""
        left, found = KEPT_BYTES[self._kind], []
        for path in sorted(self.layers, key=lambda path: -self.layers[path].inputs):
            left -= 4 * texts * self.window * self.layers[path].outputs
            if left < 0:
                break
            found.append(path)
        return frozenset(found)

    def backward(self, number: int, h: mx.array, slope: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The slopes by a block's input h and by its values. slope: that by its output."""
        settle(h, slope)
        with self._at(number):
            run = partial(Lane.backward, number=number, h=h, slope=slope, by=self.values)
            found = self._lanes.run([partial(run, texts=c) for c in self.chunks(len(h))])
        by_input, (by_values, *others) = zip(*found, strict=True)
        for other in others:
            for name, one in other.items():
                by_values[name] = by_values[name] + one if name in by_values else one
        whole = mx.concatenate(list(by_input))
        mx.eval(whole)
        return whole, {name: mx.array(a) for name, a in by_values.items()}

    def take_inputs(self, number: int, h: mx.array, slope: mx.array, take: Taking) -> mx.array:
        """The slope by a block's input h (1, window, width); take: called with each layer's path, input and
        the slope by it, (rows, inputs) both. slope: that by the block's output.
        """
        with self._at(number):
            return self._lanes.first.take_inputs(number, h, slope, take)

    def head(self, tokens: np.ndarray) -> Any:
        """A `predictions.Head` for tokens (1, window); the weights of `last_norms` come last."""

        def logits(h: mx.array, rows: slice | np.ndarray, *weights: mx.array) -> mx.array:
            if weights:
                put(self.last_norms, dict(zip(self.last_norms, weights, strict=True)))
            return self.walk.logits(tokens[:, rows], h)

        return logits

    @contextmanager
    def _at(
        self, number: int, settling: Mapping[str, float] = NOTHING, keeping: frozenset[str] = frozenset()
    ) -> Iterator[None]:
        """The block's weights are there, and products go through BLAS."""
        settle([self.layers[path].get("bias", []) for path in self.blocks[number].paths], self.values)
        for lane in self._lanes.all:
            lane.thresholds, lane.settling, lane.keeping = self.thresholds, settling, keeping
            lane.enter(number, self.values)
        try:
            with many_rows.many_rows(heads=False):
                if len(self._lanes) > 1:
                    self.matrices.unpack(self.blocks[number].paths, self._lanes.each)
                yield
        finally:
            self.matrices.free()
            if not self._holds:
                self._lanes.run([lambda lane: lane.walk.drop(number)] * len(self._lanes))
            for lane in self._lanes.all:
                lane.enter(number, self.values)

    def settle_last_norms(self) -> None:
        """Let norms behind the blocks have their values."""
        put(self.last_norms, self.values)  # of which a block has none


def _weights_of(norms: Mapping[str, Any]) -> dict[str, mx.array]:
    return {name: module["weight"].astype(mx.float32) for name, module in norms.items()}
