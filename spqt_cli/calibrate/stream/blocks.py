"""The blocks of a model whose weights stay on disk, walked one at a time.

What lies around the blocks (embedding, norm, head) runs in the model's own code: a walk is stopped after
the last block, and `logits` lets the blocks hand over hidden states that are there already. It needs
blocks that hand one array to the next, and says so of a model built otherwise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from spqt_cli.calibrate import greedy
from spqt_cli.calibrate.stream import paging
from spqt_cli.errors import UnsupportedError
from spqt_cli.measure import many_rows, probes

Run = Callable[[mx.array], mx.array]  # a block with what it gets beside: hidden states in, hidden states out


class _Walked(Exception):
    """Every block was passed: what comes after them is not wanted."""


class Chain:
    """The blocks of a probed, lazily loaded model, in the order in which they run."""

    def __init__(self, model: nn.Module, harness: probes.Harness, folder: Path) -> None:
        self.model = model
        self.blocks = greedy.blocks_of(model, harness.layers)
        self._modules = [block for block, _ in self.blocks.values()]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._weights = paging.Weights(folder, model, harness)
        self._visited: list[int] = []

    def walk(self, tokens: np.ndarray, visit: Callable[[int, Run, mx.array, list[str]], mx.array]) -> None:
        """Run tokens (windows, window) up to the last block.

        visit: a block's turn, given its number, the block, the hidden states (windows, window, width)
        before it and the paths of its layers; it returns those after it.
        Raises UnsupportedError for a model whose blocks are not a chain.
        """
        self._visited = []
        last: mx.array | None = None

        def turn(
            block: nn.Module, call: Callable[..., Any], x: mx.array, *rest: Any, **named: Any
        ) -> mx.array:
            nonlocal last
            self._check(block, x, last, (rest, named), tokens.shape)
            self._visited.append(id(block))
            paths = self.blocks[id(block)][1]
            number = len(self._visited) - 1
            last = visit(number, lambda h: _only(call(block, h, *rest, **named)), x, paths)
            if len(self._visited) == len(self.blocks):
                raise _Walked
            return last

        with probes.hooked(self._modules, turn), many_rows.many_rows(heads=False):
            try:
                self.model(mx.array(tokens))
            except _Walked:
                return
        raise UnsupportedError("some blocks of this model were not reached", "calibrate without --stream")

    def drop(self, number: int) -> None:
        """Free the weights of a block of the last walk; they are read anew when they are used again."""
        self._weights.drop(self._names[self._visited[number]])

    def logits(self, tokens: np.ndarray, hidden: mx.array) -> mx.array:
        """What norm and head make of hidden (1, rows, width) after the last block: (1, rows, vocab).

        tokens: (1, rows), for the embedding, whose result is not used.
        """
        last = self._visited[-1]

        def replay(block: nn.Module, call: Any, x: mx.array, *rest: Any, **named: Any) -> mx.array:
            return hidden if id(block) == last else x

        with probes.hooked(self._modules, replay), many_rows.many_rows():
            found: mx.array = self.model(mx.array(tokens))
            return found

    def _check(
        self, block: nn.Module, x: mx.array, last: mx.array | None, beside: Any, shape: tuple[int, ...]
    ) -> None:
        """Refuse a model whose blocks get more than the last one's output and what all windows share."""
        wide = any(
            isinstance(item[1], mx.array) and item[1].ndim and item[1].shape[0] == shape[0]
            for item in tree_flatten(beside)
        )
        broken = last is not None and x is not last
        if wide or broken or id(block) in self._visited or x.shape[:2] != shape:
            raise UnsupportedError(
                f"{self._names[id(block)]} gets more than the output of the block before it",
                "this model can't be calibrated block by block",
            )


def _only(out: Any) -> mx.array:
    """A block's output, which must be one array of hidden states."""
    if not isinstance(out, mx.array):
        raise UnsupportedError(
            "the blocks of this model hand over more than one array", "calibrate in memory"
        )
    return out
