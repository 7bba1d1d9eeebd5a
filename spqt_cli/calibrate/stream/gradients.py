"""Prices of levels for a model whose weights stay on disk: a few windows forwards, then backwards.

The same prices as gradients.py takes from the whole model. Forwards, what enters each block is kept in
the model's folder; backwards, a block is run again from there, the gradient of its output goes in, those of
its input and of its layers' inputs come out. At no time is more than one block's weights held.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate import gradients
from spqt_cli.calibrate.measurements import FIRST_TOKENS, check_counts
from spqt_cli.calibrate.stream.blocks import Chain, Run
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.measure import many_rows, probes
from spqt_cli.system import files


class Backwards:
    """One pass there and back. tokens: (windows, window), of even length; only second halves are priced."""

    def __init__(self, chain: Chain, harness: probes.Harness, tokens: np.ndarray, folder: Path) -> None:
        self.chain, self.harness, self.folder = chain, harness, folder
        self._tokens, self._half = tokens, tokens.shape[1] // 2
        self._runs: list[tuple[Run, list[str]]] = []
        self._counts: dict[str, np.ndarray] = {}
        self._dtype = mx.float32

    def costs(self, on_step: Callable[[str], None]) -> dict[str, np.ndarray]:
        """Path -> price of each of sensitivity.LEVELS, without layers of constant inputs or not reached."""
        last: list[mx.array] = []

        def visit(number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
            on_step("passing blocks for gradients")
            last[:] = [self._forwards(number, run, x, paths)]
            return last[0]

        self.chain.walk(self._tokens, visit)
        live = {path: seen for path, seen in self._counts.items() if not thresholds.is_dead(seen)}
        steps = {path: thresholds.quantile(seen, gradients.LEVELS) for path, seen in live.items()}
        prices = gradients.Sensitivity(steps, seed=0)
        slopes = [self._at_head(w, last[0][w : w + 1]) for w in range(len(self._tokens))]
        for number in reversed(range(len(self._runs))):
            on_step("pricing levels by gradients")
            with many_rows.many_rows(heads=False):
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
        self.harness.counting, self.harness.first, self.harness.length = True, FIRST_TOKENS, x.shape[1]
        out = []
        for w in range(len(x)):
            out.append(run(x[w : w + 1]))
            mx.eval(out[-1])
        self.harness.counting = False
        counts = self.harness.histograms()
        for path in counts:
            check_counts(path, counts[path])
        self._counts.update(counts)
        self.chain.drop(number)
        return mx.concatenate(out)

    def _at_head(self, w: int, hidden: mx.array) -> mx.array:
        """The gradient of -log p (drawn token) by the hidden states of the second half: (1, half, width)."""
        draw = np.random.default_rng(w * self._half)  # as the whole model's pricing draws

        def objective(h: mx.array) -> mx.array:
            return gradients.drawn_loss(self.chain.logits(self._tokens[w : w + 1, self._half :], h), draw)

        (slope,) = gradients.differentiate(objective, hidden[:, self._half :])
        return cast(mx.array, slope)

    def _backwards(
        self, number: int, slopes: list[mx.array], prices: gradients.Sensitivity
    ) -> list[mx.array]:
        """Price a block's layers; of each window, the gradient by the block's input: (1, half, width)."""
        run, _ = self._runs[number]
        before = mx.array(np.load(self._input_path(number), allow_pickle=False)).astype(self._dtype)
        found = []
        for w, slope in enumerate(slopes):
            self.harness.slopes = watch = probes.Slopes()

            def objective(
                origin: mx.array, h: mx.array, watch: probes.Slopes = watch, slope: mx.array = slope
            ) -> mx.array:
                watch.origin = origin
                return (run(h)[:, self._half :] * slope).sum()

            try:
                _, by_input = gradients.differentiate(objective, watch.origin, before[w : w + 1])
                watch.evaluate()
            finally:
                self.harness.slopes = None
            for path, x, gradient in watch.pairs():
                if path in prices.costs:
                    self._price(prices, path, x, gradient)
            found.append(by_input[:, self._half :])  # the prompt is given: nothing goes through it
        return found

    def _price(self, prices: gradients.Sensitivity, path: str, x: mx.array, gradient: mx.array) -> None:
        """Price the second half of a window, for layers that see a row for each position."""
        if x.size != self._tokens.shape[1] * x.shape[-1]:
            raise UnsupportedError(
                f"layer {path} does not see all positions at once",
                "this model can't be calibrated block by block",
            )
        x, gradient = (a.reshape(-1, a.shape[-1])[self._half :] for a in (x, gradient))
        prices.price(path, x, gradient)

    def _input_path(self, number: int) -> Path:
        return self.folder / f".spqt-hidden-input-{number}.npy"
