"""The measurements that calibration methods are made of, over one set of windows.

Histograms of a dense pass, the price of each layer's levels, thresholds that hold with upstream
skipping on, and the KL divergence of a choice on held-out windows. What the passes over the
calibration windows found is kept in the progress file, so that a cut-off run goes on there.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.calibrate.gradients import LEVELS, Sensitivity
from spqt_cli.calibrate.progress import Progress
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.measure import probes, scoring

FIRST_TOKENS = 8  # of each sequence, left out: the attention sink's huge values are no guide to the rest
SETTLING_WINDOWS = 4
KEPT_PROMPTS = 6  # windows whose prompts settling and gradients start from
SETTLING_ROUNDS = 2  # the second changes realised sparsity by some tenths of a point, a third by none
OnStep = Callable[[str], None]


def windows_done(progress: Progress) -> int:
    """How many passes over windows a progress file holds."""
    return sum(int(progress.arrays.get(name, 0)) for name in ("windows", "gradients"))


@dataclass
class Score:
    """One choice of thresholds on held-out windows: per window, KL to dense and the rise of the
    text's surprise, in nats; `masking` knows the realised shares.
    """

    masking: probes.Masking
    kl: list[float] = field(default_factory=list)
    rise: list[float] = field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))

    @property
    def mean_rise(self) -> float:
        return float(np.mean(self.rise))


class Workbench:
    """Measurements on a probed model. rows, held_out: (windows, window) tokens, window even."""

    def __init__(
        self,
        model: nn.Module,
        harness: probes.Harness,
        windows: tuple[np.ndarray, np.ndarray],
        progress: Progress,
    ) -> None:
        self.model, self.harness, self.progress = model, harness, progress
        self.rows, self.held_out = windows
        self.layers = harness.layers
        self.weights = {path: layer.inputs * layer.outputs for path, layer in self.layers.items()}
        self._caches: dict[int, list[Any]] = {}

    def histograms(self, on_step: OnStep) -> dict[str, np.ndarray]:
        """Path -> counts of |x| over a dense pass of the calibration windows, for layers that it reached."""
        saved = self.progress.arrays
        done = int(saved.get("windows", 0))
        total = {path: saved[f"counts/{path}"] for path in self.layers if f"counts/{path}" in saved}
        self.harness.counting, self.harness.first, self.harness.length = (
            True,
            FIRST_TOKENS,
            self.rows.shape[1],
        )
        for i in range(done, len(self.rows)):
            on_step("observing activations")
            self._observe(i)
            for path, counts in self.harness.histograms().items():
                total[path] = total[path] + counts if path in total else counts
            self.progress.save(windows=np.array(i + 1), **{f"counts/{path}": c for path, c in total.items()})
        self.harness.counting = False
        for path, seen in total.items():
            check_counts(path, seen)
        return total

    def _observe(self, index: int) -> None:
        """A dense pass over a window; where its prompt is wanted again, what that leaves is kept."""
        row = mx.array(self.rows[index : index + 1])
        if index >= KEPT_PROMPTS:
            probes.prompt_cache(self.model, row)
            return
        prompt, rest = mx.split(row, 2, axis=1)
        self.harness.length = prompt.shape[1]
        self._caches[index] = probes.prompt_cache(self.model, prompt)
        self.harness.first = 0
        probes.advance(self.model, rest, copy.deepcopy(self._caches[index]))
        self.harness.first, self.harness.length = FIRST_TOKENS, row.shape[1]

    def sensitivity(
        self, counts: Mapping[str, np.ndarray], windows: int, on_step: OnStep
    ) -> dict[str, np.ndarray]:
        """Path -> price of each of LEVELS, from gradients over the first `windows` calibration windows.

        counts: histograms whose quantiles the levels are. Raises UnsupportedError where the model has none.
        """
        found = Sensitivity({path: thresholds.quantile(c, LEVELS) for path, c in counts.items()}, seed=0)
        saved = self.progress.arrays
        done = int(saved.get("gradients", 0))
        if done:
            found.costs = {path: saved[f"costs/{path}"] for path in counts}
            found.positions = int(saved["positions"])
        for i in range(done, windows):
            on_step("pricing levels by gradients")
            found.add(self.model, self.harness, self.rows[i], self._prompt(i))
            costs = {f"costs/{path}": cost for path, cost in found.costs.items()}
            self.progress.save(gradients=np.array(i + 1), positions=np.array(found.positions), **costs)
        if not all(np.isfinite(cost).all() for cost in found.costs.values()):
            raise UnsupportedError("the gradients of this model are not finite", "use --method uniform")
        return found.costs

    def settled(
        self,
        counts: Mapping[str, np.ndarray],
        levels: Mapping[str, float],
        on_step: OnStep,
        rounds: int = SETTLING_ROUNDS,
        windows: int = SETTLING_WINDOWS,
    ) -> dict[str, float]:
        """Thresholds at which each layer skips its level while all others skip theirs.

        Skipping upstream shrinks what comes later, so thresholds of a dense pass skip too much.
        """
        chosen = _at(counts, levels)
        for _ in range(rounds):
            masking = probes.Masking(chosen)
            self.harness.counting, self.harness.first = True, 0
            total: dict[str, np.ndarray] = {}
            for i in range(min(windows, len(self.rows))):
                on_step("settling thresholds")
                self._fill(self.rows[i], self._prompt(i), masking)
                for path, seen in self.harness.histograms().items():
                    total[path] = total[path] + seen if path in total else seen
            self.harness.counting = False
            chosen = {**chosen, **_at(total, {path: levels[path] for path in total if path in levels})}
        return chosen

    def dense_thresholds(
        self, counts: Mapping[str, np.ndarray], levels: Mapping[str, float]
    ) -> dict[str, float]:
        """Thresholds at which each layer would skip its level if nothing upstream were skipped."""
        return _at(counts, levels)

    def _prompt(self, index: int) -> list[Any]:
        if index not in self._caches:
            counting, self.harness.counting = self.harness.counting, False
            half = self.rows.shape[1] // 2
            self._caches[index] = probes.prompt_cache(
                self.model, mx.array(self.rows[index : index + 1, :half])
            )
            self.harness.counting = counting
        return self._caches[index]

    def _decode(self, row: np.ndarray, cache: list[Any], masking: probes.Masking | None) -> mx.array:
        self.harness.masking = masking
        rest = mx.array(row[None, len(row) // 2 : -1])
        logits = probes.continuation(self.model, rest, cache)
        mx.eval(logits)
        if masking is not None:
            masking.evaluate()
        self.harness.masking = None
        return logits

    def _fill(self, row: np.ndarray, cache: list[Any], masking: probes.Masking) -> None:
        """As _decode, without the head, which a large vocabulary makes as dear as all blocks."""
        self.harness.masking = masking
        probes.advance(self.model, mx.array(row[None, len(row) // 2 : -1]), copy.deepcopy(cache))
        self.harness.masking = None

    def score(self, choices: Sequence[Mapping[str, float]], on_step: OnStep) -> list[Score]:
        """What each choice of thresholds costs on the held-out windows, against dense."""
        found = [Score(probes.Masking(choice)) for choice in choices]
        for row in self.held_out:
            half = len(row) // 2
            targets = row[None, half + 1 :]
            cache = probes.prompt_cache(self.model, mx.array(row[None, :half]))
            dense = scoring.Reference(scoring.log_probabilities(self._decode(row, cache, None)))
            expected = scoring.surprise(dense.log_p, targets).mean()
            for score in found:
                on_step("scoring on held-out text")
                log_q = scoring.log_probabilities(self._decode(row, cache, score.masking))
                score.kl.append(float(scoring.divergence(dense, log_q).mean()))
                score.rise.append(float(scoring.surprise(log_q, targets).mean() - expected))
        return found


def _at(counts: Mapping[str, np.ndarray], levels: Mapping[str, float]) -> dict[str, float]:
    return {path: float(thresholds.quantile(counts[path], [level])[0]) for path, level in levels.items()}


def check_counts(path: str, seen: np.ndarray) -> None:
    """Refuse a layer's histogram with infinities or NaN in it."""
    if seen[thresholds.FINITE_BINS :].any():
        raise SpqtError(
            f"layer {path}: infinite or undefined inputs while running the text",
            "the weights may be damaged: spqt verify, or convert again in another dtype",
        )
