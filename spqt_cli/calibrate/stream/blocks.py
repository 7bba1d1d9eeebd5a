"""The blocks of a model whose weights stay on disk, walked one at a time.

What lies around the blocks (embedding, norm, head) runs in the model's own code: a walk is stopped after
the last block, and `logits` lets the blocks hand over hidden states that are there already. It needs
blocks each of which takes one array from the last, and refuses a model built otherwise.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from spqt_cli.calibrate import greedy
from spqt_cli.decode import hooks
from spqt_cli.errors import UnsupportedError
from spqt_cli.measure import many_rows, probes

MEMORY_FRACTION = 0.8  # of the available memory that weights may take: the rest is for activations

# A block with all arguments but the first: hidden states (windows, window, width) in, the same out.
Run = Callable[[mx.array], mx.array]
# A block's turn in a walk, given its number, the block, the hidden states (windows, window, width) before
# it and the paths of its layers; it returns those after it.
Visit = Callable[[int, Run, mx.array, list[str]], mx.array]


def weights_bytes(folder: Path) -> int:
    """The bytes of a converted folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def fit_in_memory(folder: Path) -> bool:
    """True where the weights of a folder fit in the memory that is available."""
    return bytes_fit(weights_bytes(folder))


def bytes_fit(size: int) -> bool:
    """True where weights of so many bytes do."""
    import psutil

    return size <= MEMORY_FRACTION * psutil.virtual_memory().available


class _Walked(Exception):
    """Every block was passed: what comes after them is not wanted."""


@dataclass(frozen=True)
class Block:
    """A block as a walk met it. name: of its module. run: its call, with what it got beside the states.

    paths: of its layers.
    """

    name: str
    module: nn.Module
    run: Run
    paths: list[str]


class Walk:
    """The blocks of a model that hold the layers at `paths`, in the order in which they run."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._model = model
        self._blocks = greedy.blocks_of(model, paths)
        self._modules = [block for block, _ in self._blocks.values()]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._visited: list[int] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def walk(self, tokens: np.ndarray, visit: Visit) -> None:
        """Run tokens (windows, window) up to the last block, each by `visit`.

        Raises UnsupportedError for a model whose blocks take more than the last one's output.
        """
        self._visited = []
        last: mx.array | None = None

        def turn(
            block: nn.Module, call: Callable[..., Any], x: mx.array, *rest: Any, **named: Any
        ) -> mx.array:
            nonlocal last
            self._check(block, x, last, (rest, named), tokens.shape)
            self._visited.append(id(block))
            paths = self._blocks[id(block)][1]
            number = len(self._visited) - 1
            last = visit(number, lambda h: _only(call(block, h, *rest, **named)), x, paths)
            if len(self._visited) == len(self._blocks):
                raise _Walked
            return last

        with probes.hooked(self._modules, turn), many_rows.many_rows(heads=False):
            try:
                self._model(mx.array(tokens))
            except _Walked:
                return
        raise UnsupportedError("some blocks of this model were not reached", "calibrate without --stream")

    def blocks(self, window: int) -> list[Block]:
        """All blocks, ready to run on windows of so many tokens; none is computed."""
        found: list[Block] = []

        def visit(number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
            identity = self._visited[number]
            found.append(Block(self._names[identity], self._blocks[identity][0], run, paths))
            return x

        self.walk(np.zeros((2, window), np.int32), visit)
        return found

    def embedded(self, tokens: np.ndarray) -> mx.array:
        """The hidden states (windows, window, width) that the first block gets for tokens."""
        entered: list[mx.array] = []

        def enter(block: nn.Module, call: Any, x: mx.array, *rest: Any, **named: Any) -> mx.array:
            entered.append(x)
            raise _Walked

        with probes.hooked(self._modules, enter), contextlib.suppress(_Walked):
            self._model(mx.array(tokens))
        return entered[0]

    def logits(self, tokens: np.ndarray, hidden: mx.array) -> mx.array:
        """What norm and head make of hidden (1, rows, width) after the last block: (1, rows, vocab).

        tokens: (1, rows), for the embedding, whose result is not used.
        """
        last = self._visited[-1]

        def replay(block: nn.Module, call: Any, x: mx.array, *rest: Any, **named: Any) -> mx.array:
            return hidden if id(block) == last else x

        with probes.hooked(self._modules, replay), many_rows.many_rows():
            return cast(mx.array, self._model(mx.array(tokens)))

    def _check(
        self, block: nn.Module, x: mx.array, last: mx.array | None, others: Any, shape: tuple[int, ...]
    ) -> None:
        """Refuse a block that gets more than the last one's output x and what all windows share.

        others: its other arguments. shape: (windows, window).
        """
        by_window = any(
            isinstance(item[1], mx.array) and item[1].ndim and item[1].shape[0] == shape[0]
            for item in tree_flatten(others)
        )
        broken = last is not None and x is not last
        # keys and values of blocks before, which would grow with every pass
        remembers = any(hasattr(item, "update_and_fetch") for item in (*others[0], *others[1].values()))
        if by_window or broken or remembers or id(block) in self._visited or x.shape[:2] != shape:
            raise UnsupportedError(
                f"{self._names[id(block)]} gets more than the output of the block before it",
                "this model can't be calibrated block by block",
            )


class Blocks(Walk):
    """The blocks of a probed, lazily loaded model, whose weights can be dropped."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], folder: Path) -> None:
        super().__init__(model, layers)
        self._weights = Weights(folder, model, layers)

    def drop(self, number: int) -> None:
        """Free the weights of a block of the last walk; they are read anew when they are used again."""
        self._weights.drop(self._names[self._visited[number]])


def undivided(model: nn.Module, paths: Iterable[str]) -> Block:
    """A whole model as one block, where its blocks can't be walked: what enters and leaves are tokens."""

    def run(tokens: mx.array) -> mx.array:
        model(tokens.astype(mx.int32))  # its logits are never computed
        return tokens

    return Block("", model, run, list(paths))


def _only(out: Any) -> mx.array:
    """A block's output, which must be one array of hidden states."""
    if not isinstance(out, mx.array):
        raise UnsupportedError(
            "the blocks of this model hand over more than one array", "calibrate in memory"
        )
    return out


def through(run: Run, x: mx.array) -> list[mx.array]:
    """Each window of x (windows, window, width) after a block: (1, window, width), computed."""
    out = []
    for w in range(len(x)):
        out.append(run(x[w : w + 1]))
        mx.eval(out[-1])
    return out


class Weights:
    """The weights of blocks, read anew from the shards whenever a block was used."""

    def __init__(self, folder: Path, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._modules = {**dict(model.named_modules()), **layers}  # layers, not their probes
        self._files = {
            name: file for file in sorted(folder.glob("model*.safetensors")) for name in _stored(file)
        }

    def drop(self, prefix: str) -> None:
        """Put unread arrays in the place of a block's weights, which frees what was read."""
        names = [name for name in self._files if name.startswith(prefix + ".")]
        for file in {self._files[name] for name in names}:
            stored = _stored(file)
            for name in names:
                path, _, attribute = name.rpartition(".")
                if self._files[name] == file and path in self._modules:
                    self._modules[path][attribute] = stored[name]
        if many_rows.on_cpu():
            hooks.compute_in_float32(self._modules[prefix])
        mx.clear_cache()


def _stored(file: Path) -> dict[str, mx.array]:
    """Name -> array of a shard, none of them read yet."""
    return cast("dict[str, mx.array]", mx.load(str(file)))
