"""Calibration methods: which layer skips how much, and the choice among them by measurement.

uniform: the same share everywhere (TEAL's criterion, arXiv 2408.14690, without its search).
gradient: shares by price, from gradients through the dense quantized model (gradients.py).
paper: TEAL's block-wise greedy search (greedy.py).

`fast` takes gradient unseen; `auto` measures uniform and gradient on held-out windows and keeps the
one with the lowest KL divergence to the dense quantized model, so it never ends worse there than
uniform. Of a model through which no gradients pass it measures uniform alone, and says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from spqt_cli.calibrate import allocation, greedy
from spqt_cli.calibrate.gradients import LEVELS
from spqt_cli.calibrate.measurements import SETTLING_ROUNDS, SETTLING_WINDOWS, OnStep, Workbench
from spqt_cli.calibrate.result import LayerRow
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import probes

CANDIDATES = {
    "auto": ("uniform", "gradient"),
    "fast": ("gradient",),
    "paper": ("paper",),
    "uniform": ("uniform",),
}
# At most. From 4 on, more changed KL by under 1 % on SmolLM2-135M; one costs four dense passes over it.
GRADIENT_WINDOWS = {"auto": 6, "fast": 2}
SECOND_WINDOWS = {"fast": 2}  # of settling at a second share, where fewer than SETTLING_WINDOWS
ROUNDS = {"fast": 1}  # of settling, where fewer than usual: some tenths of a point for a tenth of the time


def steps(method: str, rows: int, held_out: int) -> int:
    """How often a run of the method reports a step, for windows to calibrate on and held out."""
    settling = min(SETTLING_WINDOWS, rows)
    each = ROUNDS.get(method, SETTLING_ROUNDS) * settling + held_out
    second = min(SECOND_WINDOWS.get(method, settling), rows)
    return rows + min(GRADIENT_WINDOWS.get(method, 0), rows) + len(CANDIDATES[method]) * each + second


def second_share(target: float) -> float | None:
    """Where thresholds are settled beside the target, so that shares between and around hold as well."""
    if not target:
        return None
    return 0.5 if target <= 0.4 else target / 2


@dataclass
class Candidate:
    """One allocation and what it measured.

    levels: path -> the layer's share at each total of CURVE_SPARSITIES. chosen: path -> threshold at
    the target, settled; second: another share, and thresholds settled there, if there are any. kl: mean
    per held-out window, nats, against the dense quantized model.
    """

    name: str
    levels: dict[str, np.ndarray]
    chosen: dict[str, float] = field(default_factory=dict)
    kl: list[float] = field(default_factory=list)
    realised: dict[str, float] = field(default_factory=dict)
    second: tuple[float, dict[str, float]] = (0.0, {})

    def at(self, target: float) -> dict[str, float]:
        """Path -> the layer's share at a total."""
        return {
            path: float(np.interp(target, CURVE_SPARSITIES, levels)) for path, levels in self.levels.items()
        }

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))


def allocated(costs: Mapping[str, np.ndarray], weights: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Path -> the layer's share at each total of CURVE_SPARSITIES, by prices of LEVELS.

    Layers without a price (an expert that the priced windows never chose, an output that nothing uses) skip
    the total, as all do in `uniform`: taken as free they would bear all of it.
    """
    priced = {path: cost for path, cost in costs.items() if cost.any()}
    found = dict.fromkeys(costs, np.array(CURVE_SPARSITIES))
    if priced:
        found |= allocation.cheapest_levels(
            priced, {path: weights[path] for path in priced}, np.array(LEVELS)
        )
    return found


def layer_row(path: str, best: Candidate, target: float, counts: np.ndarray | None) -> LayerRow:
    """What a layer got. counts: its histogram; None where the text never reached it."""
    if counts is None:
        return LayerRow(path, 0.0, 0.0, 0.0, False, unreached=True)
    if path not in best.chosen:
        return LayerRow(path, 0.0, 0.0, 0.0, True)
    zeros = thresholds.zeros(counts) if thresholds.lossless(counts) else 0.0
    return LayerRow(
        path, best.at(target)[path], best.chosen[path], best.realised.get(path, 0.0), False, zeros
    )


class Search:
    """All candidates of a method on a workbench, and the winner."""

    def __init__(self, bench: Workbench, counts: Mapping[str, np.ndarray], target: float) -> None:
        """counts: histograms of the live layers; the others stay dense."""
        self.bench, self.counts, self.target = bench, dict(counts), target
        self.without_gradients = ""  # why uniform shares are all that `auto` could try
        self._lossless = {path: thresholds.lossless(seen) for path, seen in self.counts.items()}

    def run(self, method: str, on_step: OnStep) -> list[Candidate]:
        """The measured candidates of a method, the winner first."""
        candidates = self.candidates(method, on_step)
        for candidate in candidates:
            self._settle(candidate, on_step, ROUNDS.get(method, SETTLING_ROUNDS))
        scores = self.bench.score([candidate.chosen for candidate in candidates], on_step)
        for candidate, score in zip(candidates, scores, strict=True):
            candidate.kl, candidate.realised = score.kl, score.masking.realised()
        return sorted(candidates, key=lambda candidate: candidate.mean_kl)  # stable: uniform wins a tie

    def _settle(self, candidate: Candidate, on_step: OnStep, rounds: int) -> None:
        if not self.target:
            candidate.chosen = dict(self._lossless)
        else:
            chosen = self.bench.settled(self.counts, candidate.at(self.target), on_step, rounds)
            candidate.chosen = {path: max(t, self._lossless[path]) for path, t in chosen.items()}

    def candidates(self, method: str, on_step: OnStep) -> list[Candidate]:
        """The method's allocations, unmeasured; the most elaborate last."""
        uniform = Candidate("uniform", {path: np.array(CURVE_SPARSITIES) for path in self.counts})
        if method == "uniform" or not self.target:
            return [uniform]
        if method == "paper":
            bench = self.bench
            levels = greedy.levels(bench.model, bench.harness, bench.rows[0], self.counts, on_step)
            return [Candidate("paper", levels)]
        windows = min(GRADIENT_WINDOWS[method], len(self.bench.rows))
        try:
            costs = self.bench.sensitivity(self.counts, windows, on_step)
        except UnsupportedError as error:
            if method == "fast":
                raise
            self.without_gradients = f"{error.cause}; so all layers skip the same share"
            return [uniform]
        gradient = Candidate("gradient", allocated(costs, self.bench.weights))
        return [gradient] if method == "fast" else [uniform, gradient]

    def curves(self, candidate: Candidate, method: str, on_step: OnStep | None) -> dict[str, list[float]]:
        """Path -> the layer's `curve`. on_step: None where the model is not in memory.

        In memory the candidate is settled at a second share: what settling changes is no straight line.
        """
        share = second_share(self.target)
        if on_step is not None and share is not None:
            windows = SECOND_WINDOWS.get(method, SETTLING_WINDOWS)
            settled = self.bench.settled(self.counts, candidate.at(share), on_step, 1, windows)
            candidate.second = (share, settled)
        return {path: self.curve(candidate, path) for path in self.counts}

    def curve(self, candidate: Candidate, path: str) -> list[float]:
        """The layer's thresholds at CURVE_SPARSITIES, passing through the settled one at the target.

        Where it has exact zeros, they are skipped at every share, 0 included.

        Elsewhere the dense pass's thresholds are scaled by as much as settling changed those at the
        settled shares, in proportion between them and up to twice the highest.
        """
        quantiles = thresholds.quantile(self.counts[path], candidate.levels[path])
        dense = np.maximum(quantiles, self._lossless[path])
        shares = np.array(CURVE_SPARSITIES)
        drift = {0.0: 0.0}
        share, settled_there = candidate.second
        second = [(share, settled_there[path])] if share else []
        for share, settled in sorted([*second, (self.target, candidate.chosen[path])]):
            if at_share := np.interp(share, shares, dense):
                drift[share] = settled / at_share - 1
        last = max(drift)
        if not last:
            return dense.tolist()
        drift[2 * last] = 2 * drift[last]
        scaled = dense * np.maximum(1 + np.interp(shares, list(drift), list(drift.values())), 0)
        settled = candidate.chosen[path]
        bounded = np.where(shares <= self.target, np.minimum(scaled, settled), np.maximum(scaled, settled))
        return np.maximum.accumulate(np.maximum(bounded, self._lossless[path])).tolist()

    def overall(self, candidate: Candidate) -> float:
        """The share of all Zigzag weights that a candidate skips on held-out text."""
        return probes.weighted(candidate.realised, self.bench.layers)
