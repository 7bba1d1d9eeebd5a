"""The source's own model with the weights of one block in memory at a time."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from spqt_cli.calibrate.stream.blocks import Block, Walk, undivided
from spqt_cli.convert import parameters
from spqt_cli.convert.source import Checkpoint
from spqt_cli.errors import UnsupportedError
from spqt_cli.measure import many_rows


class SourceBlocks:
    """Blocks of an unquantized model, each filled with its weights before it runs and emptied after.

    A model whose blocks can't be walked is one block. On the CPU it computes in float32.
    """

    def __init__(self, checkpoint: Checkpoint, paths: list[str], window: int) -> None:
        """paths: of the layers whose blocks are walked. window: tokens of a text."""
        self._checkpoint = checkpoint
        self.network, self._weights, self._sources = parameters.load(checkpoint)
        self.network.eval()
        self.modules: dict[str, Any] = dict(self.network.named_modules())
        self.walk: Walk | None = Walk(self.network, paths)
        try:
            blocks = self.walk.blocks(window)
        except UnsupportedError:
            self.walk, self.blocks = None, [undivided(self.network, paths)]
            return
        inside = tuple(f"{block.name}." for block in blocks)
        self._put([name for name in self._weights if not name.startswith(inside)])
        self.blocks = self.walk.blocks(window)  # once more: what goes along may come from those weights

    def entering(self, tokens: np.ndarray) -> mx.array:
        """What the first block gets for tokens (texts, window): hidden states, or tokens once more."""
        return mx.array(tokens) if self.walk is None else self.walk.embedded(tokens)

    def fill(self, block: Block) -> None:
        """Read a block's weights."""
        self._put(self._names(block))

    def drop(self, block: Block) -> None:
        """Free a block's weights, for good."""
        nothing = tree_map(lambda _: mx.zeros(()), block.module.parameters())
        block.module.update(nothing)
        mx.clear_cache()

    def pass_over(self, block: Block) -> None:
        """Never read a block's weights: it was done in an earlier run."""
        for name in self._names(block):
            del self._weights[name]

    def _names(self, block: Block) -> list[str]:
        return [name for name in self._weights if not block.name or name.startswith(f"{block.name}.")]

    def weight(self, path: str) -> mx.array:
        """The matrix (outputs, inputs) of a filled block's linear layer."""
        found: mx.array = self.modules[path].weight
        return found

    def _put(self, names: list[str]) -> None:
        self._checkpoint.check_unchanged()
        arrays = []
        for name in names:
            array = self._weights.pop(name)
            if self._checkpoint.gguf is not None:
                array = self._checkpoint.read(self._sources[name])
            if many_rows.on_cpu() and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(mx.float32)
            mx.eval(array)
            arrays.append((name, array))
        self.network.load_weights(arrays, strict=False)
        self._checkpoint.check_unchanged()
