"""Prices of levels for a model whose weights stay on disk: a few windows forwards, then backwards.

The same prices as sensitivity.py takes from the whole model. Forwards, what enters each block is kept in
the model's folder; backwards, a block is run again from there, the gradient of its output goes in, those of
its input and of its layers' inputs come out. At no time is more than one block's weights held.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from spqt_cli import blas, files, observe, sensitivity, thresholds
from spqt_cli.chain import Chain, Run
from spqt_cli.workbench import FIRST_TOKENS, check_counts


class Backwards:
    """One pass there and back. tokens: (windows, window), of even length; only second halves are priced."""

    def __init__(self, chain: Chain, harness: observe.Harness, tokens: np.ndarray, folder: Path) -> None:
        self.chain, self.harness, self.folder = chain, harness, folder
        self._tokens, self._half = tokens, tokens.shape[1] // 2
        self._runs: list[tuple[Run, list[str]]] = []
        self._counts: dict[str, np.ndarray] = {}
        self._dtype = mx.float32

    def costs(self, on_step: Callable[[str], None]) -> dict[str, np.ndarray]:
        """Path -> price of each of sensitivity.LEVELS; layers with constant inputs are left out."""
        last: list[mx.array] = []

        def visit(number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
            on_step("passing blocks for gradients")
            last[:] = [self._forwards(number, run, x, paths)]
            return last[0]

        self.chain.walk(self._tokens, visit)
        live = {path: seen for path, seen in self._counts.items() if not thresholds.is_dead(seen)}
        steps = {path: thresholds.quantile(seen, sensitivity.LEVELS) for path, seen in live.items()}
        prices = sensitivity.Sensitivity(steps, seed=0)
        slopes = [self._at_head(w, last[0][w : w + 1]) for w in range(len(self._tokens))]
        for number in reversed(range(len(self._runs))):
            on_step("pricing levels by gradients")
            with blas.many_rows(heads=False):
                slopes = self._backwards(number, slopes, prices)
            self.chain.drop(number)
            self._input_path(number).unlink()
        return prices.costs

    def _forwards(self, number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
        """The hidden states after a block; those before it are kept, its layers' inputs are counted."""
        self._runs.append((run, paths))
        self._dtype = x.dtype
        with files.disk_errors(self.folder):
            np.save(self._input_path(number), np.array(x.astype(mx.float32)))
        self.harness.counting, self.harness.first = True, FIRST_TOKENS
        out = []
        for w in range(len(x)):
            out.append(run(x[w : w + 1]))
            mx.eval(out[-1])
        self.harness.counting = False
        counts = self.harness.histograms()
        for path in paths:
            check_counts(path, counts)
        self._counts.update(counts)
        self.chain.drop(number)
        return mx.concatenate(out)

    def _at_head(self, w: int, hidden: mx.array) -> mx.array:
        """The gradient of -log p (drawn token) by the hidden states of the second half: (1, half, width)."""
        draw = np.random.default_rng(w * self._half)  # as the whole model's pricing draws

        def objective(h: mx.array) -> mx.array:
            return sensitivity.drawn_loss(self.chain.logits(self._tokens[w : w + 1, self._half :], h), draw)

        slope = mx.grad(objective)(hidden[:, self._half :])
        mx.eval(slope)
        return slope

    def _backwards(
        self, number: int, slopes: list[mx.array], prices: sensitivity.Sensitivity
    ) -> list[mx.array]:
        """Price a block's layers; of each window, the gradient by the block's input: (1, half, width)."""
        run, paths = self._runs[number]
        before = mx.array(np.load(self._input_path(number), allow_pickle=False)).astype(self._dtype)
        layers, found = self.harness.layers, []
        for w, slope in enumerate(slopes):
            x = before[w : w + 1]
            shifts = {path: mx.zeros((*x.shape[:2], layers[path].inputs)) for path in paths}
            inputs: dict[str, mx.array] = {}
            self.harness.inputs = inputs

            def objective(h: mx.array, values: dict[str, mx.array], slope: mx.array = slope) -> mx.array:
                self.harness.shifts = values
                return (run(h)[:, self._half :] * slope).sum()

            try:
                by_input, by_layer = mx.grad(objective, argnums=(0, 1))(x, shifts)
                mx.eval(by_input, by_layer, inputs)
            finally:
                self.harness.shifts = self.harness.inputs = None
            for path in set(paths) & prices.costs.keys():
                prices.price(path, inputs[path][:, self._half :], by_layer[path][:, self._half :])
            found.append(by_input[:, self._half :])  # the prompt is given: nothing goes through it
        return found

    def _input_path(self, number: int) -> Path:
        return self.folder / f".spqt-hidden-input-{number}.npy"
