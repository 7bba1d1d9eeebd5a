"""Measurements with the whole model in memory.

What the passes over the calibration windows find is kept in the progress file, so that an interrupted
run goes on there. Passes with channels skipped are not kept.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.calibrate import greedy
from spqt_cli.calibrate.curves import second_sparsity
from spqt_cli.calibrate.gradients import SPARSITIES, Sensitivity
from spqt_cli.calibrate.measurements import (
    FIRST_TOKENS,
    REFINING_ROUNDS,
    REFINING_WINDOWS,
    Allocation,
    Candidate,
    Effort,
    OnProgress,
    Score,
    add,
    at_least_lossless,
    check_counts,
    refined,
    skippable,
)
from spqt_cli.calibrate.progress import Progress
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.measure import probes, scoring

KEPT_PROMPTS = 6  # windows whose prompts refining and gradients start from


class InMemory:
    """Measurements (measurements.py) on a probed model.

    windows: to calibrate on and held out, (windows, window) tokens each, window even; the first half of
    a window is a prompt, run dense.
    """

    def __init__(
        self,
        model: nn.Module,
        harness: probes.Harness,
        windows: tuple[np.ndarray, np.ndarray],
        progress: Progress,
        on_progress: OnProgress,
    ) -> None:
        self.layers = harness.layers
        self._model, self._harness, self._progress = model, harness, progress
        self._rows, self._held_out = windows
        self._on_progress = on_progress
        self.costs: dict[str, np.ndarray] = {}
        self._prompts: dict[int, list[Any]] = {}  # window -> the model's cache after its first half

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Path -> histogram over a dense pass of the calibration windows, for layers that it reached."""
        saved = self._progress.arrays
        total = {path: saved[f"counts/{path}"] for path in self.layers if f"counts/{path}" in saved}
        for i in range(int(saved.get("windows", 0)), len(self._rows)):
            self._on_progress(i, len(self._rows), "observing activations")
            add(total, self._observed(i))
            self._progress.save(
                windows=np.array(i + 1), **{f"counts/{path}": seen for path, seen in total.items()}
            )
        check_counts(total)
        return total

    @cached_property
    def skippable(self) -> dict[str, np.ndarray]:
        """The histograms of the layers that may skip channels."""
        return skippable(self.counts)

    def _observed(self, index: int) -> dict[str, np.ndarray]:
        """The histograms of a dense pass over a window; the caches of the first prompts are kept."""
        row, window = mx.array(self._rows[index : index + 1]), self._rows.shape[1]
        if index >= KEPT_PROMPTS:
            with self._harness.counting(FIRST_TOKENS, window) as found:
                probes.prompt_cache(self._model, row)
            return found
        prompt, rest = mx.split(row, 2, axis=1)
        with self._harness.counting(FIRST_TOKENS, window // 2) as found:
            self._prompts[index] = probes.prompt_cache(self._model, prompt)
        with self._harness.counting() as second:
            probes.advance(self._model, rest, copy.deepcopy(self._prompts[index]))
        add(found, second)
        return found

    def sensitivities(self, windows: int) -> dict[str, np.ndarray]:
        """Path -> cost of each of SPARSITIES, from gradients over the first `windows` calibration windows."""
        counts, count = self.skippable, min(windows, len(self._rows))
        found = Sensitivity({path: thresholds.quantile(c, SPARSITIES) for path, c in counts.items()}, seed=0)
        saved = self._progress.arrays
        done = int(saved.get("gradients", 0))
        if done:
            found.costs = {path: saved[f"costs/{path}"] for path in counts}
            found.positions = int(saved["positions"])
        for i in range(done, count):
            self._on_progress(i, count, "measuring sensitivities by gradients")
            found.add(self._model, self._harness, self._rows[i], self._prompt(i))
            costs = {f"costs/{path}": cost for path, cost in found.costs.items()}
            self._progress.save(gradients=np.array(i + 1), positions=np.array(found.positions), **costs)
        if not all(np.isfinite(cost).all() for cost in found.costs.values()):
            raise UnsupportedError("the gradients of this model are not finite", "use --method uniform")
        self.costs = {path: cost / found.positions for path, cost in found.costs.items()}
        return found.costs

    def measured(self, allocations: Sequence[Allocation], sparsity: float, effort: Effort) -> list[Candidate]:
        """The candidates at a sparsity, the one of least KL first; that one is refined a second time."""
        candidates = [self.candidate(one) for one in allocations]
        for candidate in candidates:
            rounds = effort.rounds if sparsity else 0
            chosen = self.refined(candidate.at(sparsity), rounds)
            candidate.thresholds = at_least_lossless(chosen, self.counts)
        scores = self.score([candidate.thresholds for candidate in candidates])
        for candidate, score in zip(candidates, scores, strict=True):
            candidate.kl, candidate.realised = score.kl, score.realised
        candidates.sort(key=lambda candidate: candidate.mean_kl)  # stable: the first wins a tie
        second = second_sparsity(sparsity)
        if second is not None and effort.second_windows:
            best = candidates[0]
            best.second = (second, self.refined(best.at(second), 1, effort.second_windows))
        return candidates

    def candidate(self, allocation: Allocation) -> Candidate:
        """An allocation over this model's layers, unmeasured."""
        if allocation.sparsities is None:
            found = greedy.sparsities(
                self._model, self._harness, self._rows[0], self.skippable, self._on_progress
            )
        else:
            found = allocation.over(self.skippable)
        return Candidate(allocation.name, found, note=allocation.note)

    def refined(
        self,
        sparsities: Mapping[str, float],
        rounds: int = REFINING_ROUNDS,
        windows: int = REFINING_WINDOWS,
    ) -> dict[str, float]:
        """Path -> the threshold at which the layer skips its sparsity while all others skip theirs."""
        count = min(windows, len(self._rows))

        def masked_pass(chosen: Mapping[str, float]) -> dict[str, np.ndarray]:
            masking, total = probes.Masking(chosen), dict[str, np.ndarray]()
            for i in range(count):
                self._on_progress(i, count, "refining thresholds")
                # not the last token, nor the head, which a large vocabulary makes as costly as all blocks
                prompt, rest = self._prompt(i), mx.array(self._rows[i : i + 1, self._half : -1])
                with self._harness.counting() as seen, self._harness.masked(masking):
                    probes.advance(self._model, rest, copy.deepcopy(prompt))
                add(total, seen)
            return total

        return refined(self.skippable, sparsities, rounds, masked_pass)

    def score(self, choices: Sequence[Mapping[str, float]]) -> list[Score]:
        """What each choice of thresholds costs on the held-out windows, against dense."""
        found, maskings = [Score() for _ in choices], [probes.Masking(choice) for choice in choices]
        total = len(self._held_out) * len(choices)
        for i, row in enumerate(self._held_out):
            targets = row[None, self._half + 1 :]
            cache = probes.prompt_cache(self._model, mx.array(row[None, : self._half]))
            dense = scoring.Reference(self._predicted(row, cache))
            expected = scoring.surprise(dense.log_p, targets).mean()
            for j, (score, masking) in enumerate(zip(found, maskings, strict=True)):
                self._on_progress(i * len(choices) + j, total, "scoring on held-out text")
                with self._harness.masked(masking):
                    log_q = self._predicted(row, cache)
                masking.evaluate()
                score.kl.append(float(scoring.divergence(dense, log_q).mean()))
                score.rise.append(float(scoring.surprise(log_q, targets).mean() - expected))
        for score, masking in zip(found, maskings, strict=True):
            score.realised = masking.realised()
        return found

    @property
    def _half(self) -> int:
        return self._rows.shape[1] // 2

    def _prompt(self, index: int) -> list[Any]:
        if index not in self._prompts:
            prompt = mx.array(self._rows[index : index + 1, : self._half])
            self._prompts[index] = probes.prompt_cache(self._model, prompt)
        return self._prompts[index]

    def _predicted(self, row: np.ndarray, cache: list[Any]) -> scoring.Predictions:
        """Log-probabilities (1, half - 1, vocab) of a window's second half, its last token left out."""
        rest = mx.array(row[None, self._half : -1])
        return scoring.log_probabilities(probes.continuation(self._model, rest, cache))
