"""Costs of skipping for a model whose weights stay on disk: a few windows forwards, then backwards.

They are the same costs as gradients.py takes from the whole model. Forwards, what enters each block is kept
in the model's folder. Backwards, a block is run again from there; the gradient by its output goes in,
the gradients by its input and by its layers' inputs come out. One block's weights are held at a time.
"""

from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate import gradients
from spqt_cli.calibrate.measurements import FIRST_TOKENS, OnProgress, check_counts, skippable
from spqt_cli.calibrate.stream.blocks import Blocks, Run, through
from spqt_cli.format import thresholds
from spqt_cli.measure import many_rows, probes
from spqt_cli.system import files


def sensitivities(
    blocks: Blocks, harness: probes.Harness, tokens: np.ndarray, folder: Path, on_progress: OnProgress
) -> dict[str, np.ndarray]:
    """Path -> cost of each of gradients.SPARSITIES, for layers that may skip and that the text reached.

    tokens: (windows, window), of even length; the costs are those of the second halves. folder: for what
    enters the blocks, while this runs.
    """
    both = _ThereAndBack(blocks, harness, tokens, folder)
    return both.backwards(both.forwards(on_progress), on_progress)


class _ThereAndBack:
    """One pass over windows through all blocks, and the way back."""

    def __init__(self, blocks: Blocks, harness: probes.Harness, tokens: np.ndarray, folder: Path) -> None:
        self._blocks, self._harness, self._folder = blocks, harness, folder
        self._tokens, self._half = tokens, tokens.shape[1] // 2
        self._runs: list[Run] = []
        self._counts: dict[str, np.ndarray] = {}
        self._dtype = mx.float32

    def forwards(self, on_progress: OnProgress) -> mx.array:
        """The hidden states (windows, window, width) after the last block; those before each are kept."""
        last: list[mx.array] = []

        def visit(number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
            on_progress(number, len(self._blocks), "passing blocks for gradients")
            self._runs.append(run)
            self._dtype = x.dtype
            with files.disk_errors(self._folder):
                np.save(self._input_path(number), np.array(x.astype(mx.float32)))
            with self._harness.counting(FIRST_TOKENS, x.shape[1]) as counts:
                last[:] = [mx.concatenate(through(run, x))]
            check_counts(counts)
            self._counts.update(counts)
            self._blocks.drop(number)
            return last[0]

        self._blocks.walk(self._tokens, visit)
        return last[0]

    def backwards(self, hidden: mx.array, on_progress: OnProgress) -> dict[str, np.ndarray]:
        """Path -> cost of each of gradients.SPARSITIES. hidden: as `forwards` gives it."""
        counts = skippable(self._counts)
        found = gradients.Sensitivity(
            {path: thresholds.quantile(seen, gradients.SPARSITIES) for path, seen in counts.items()}, seed=0
        )
        slopes = [self._at_head(w, hidden[w : w + 1]) for w in range(len(self._tokens))]
        for number in reversed(range(len(self._runs))):
            done = len(self._runs) - 1 - number
            on_progress(done, len(self._runs), "measuring sensitivities by gradients")
            with many_rows.many_rows(heads=False):
                slopes = self._through_block(number, slopes, found)
            self._blocks.drop(number)
            self._input_path(number).unlink()
        return found.costs

    def _at_head(self, w: int, hidden: mx.array) -> mx.array:
        """The gradient of -log p(drawn token) by the hidden states of the second half: (1, half, width)."""
        draw = np.random.default_rng(w * self._half)  # as with the whole model

        def objective(h: mx.array) -> mx.array:
            return gradients.drawn_loss(self._blocks.logits(self._tokens[w : w + 1, self._half :], h), draw)

        (slope,) = gradients.differentiate(objective, hidden[:, self._half :])
        return cast(mx.array, slope)

    def _through_block(
        self, number: int, slopes: list[mx.array], found: gradients.Sensitivity
    ) -> list[mx.array]:
        """Add the costs of a block's layers. Of each window, the gradient by the block's input.

        slopes: those by its output; (1, half, width) each.
        """
        before = mx.array(np.load(self._input_path(number), allow_pickle=False)).astype(self._dtype)
        return [
            self._through_window(self._runs[number], before[w : w + 1], slope, found)
            for w, slope in enumerate(slopes)
        ]

    def _through_window(
        self, run: Run, before: mx.array, slope: mx.array, found: gradients.Sensitivity
    ) -> mx.array:
        with self._harness.differentiated() as slopes:

            def objective(origin: mx.array, h: mx.array) -> mx.array:
                slopes.origin = origin
                return (run(h)[:, self._half :] * slope).sum()

            _, by_input = gradients.differentiate(objective, slopes.origin, before)
            slopes.evaluate()
        for path, x, gradient in slopes.pairs():
            if path in found.costs:
                found.add_rows(path, self._second_half(path, x), self._second_half(path, gradient))
        return cast(mx.array, by_input)[:, self._half :]  # the prompt is given: nothing goes through it

    def _second_half(self, path: str, x: mx.array) -> mx.array:
        """The rows (half, inputs) of a window's second half; of experts those of each position together."""
        each = probes.rows_of_each(path, x, self._tokens.shape[1])
        return x.reshape(-1, x.shape[-1])[self._half * each :]

    def _input_path(self, number: int) -> Path:
        return self._folder / f".spqt-hidden-input-{number}.npy"
