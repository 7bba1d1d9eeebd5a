"""Measurements of a model that does not fit in memory: one block of weights is loaded at a time.

All windows pass through a block together, twice: dense, for the histograms, and with channels skipped,
for refining thresholds and for the score. Their hidden states are kept, the block's weights are dropped,
and the next block's are read (blocks.py). For gradients a few windows go through all blocks before,
forwards and backwards (gradients.py). Progress is saved block by block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.calibrate import greedy
from spqt_cli.calibrate.measurements import (
    FIRST_TOKENS,
    REFINING_WINDOWS,
    Allocation,
    Candidate,
    Effort,
    OnProgress,
    at,
    at_least_lossless,
    check_counts,
    refined,
    skippable,
)
from spqt_cli.calibrate.progress import Progress
from spqt_cli.calibrate.stream import gradients
from spqt_cli.calibrate.stream.blocks import Blocks, Run, through
from spqt_cli.measure import probes, scoring
from spqt_cli.system import files


@dataclass
class _States:
    """The hidden states after the first `blocks` blocks.

    dense: (windows, window, width). masked: window -> (1, window, width), of those that thresholds are
    refined or scored on: its prompt is dense, channels are skipped after it. None, {}: before the first.
    """

    blocks: int = 0
    dense: mx.array | None = None
    masked: dict[int, mx.array] = field(default_factory=dict)

    def resumed(self, dtype: mx.Dtype) -> mx.array:
        """The dense states, all states being in the model's dtype again."""
        assert self.dense is not None
        self.dense = self.dense.astype(dtype)
        self.masked = {w: h.astype(dtype) for w, h in self.masked.items()}
        return self.dense


class Streamed:
    """Measurements (measurements.py) on a probed, lazily loaded model; hidden states go into its folder.

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
        self.layers, self.counts = harness.layers, dict[str, np.ndarray]()
        self.costs: dict[str, np.ndarray] = {}
        self._harness, self._progress, self._on_progress = harness, progress, on_progress
        self._windows = np.concatenate(windows)
        self._half = self._windows.shape[1] // 2
        self._calibrating = len(windows[0])  # of the windows; the others are held out
        self._held_out = range(self._calibrating, len(self._windows))
        self._refining = range(min(REFINING_WINDOWS, self._calibrating))
        self._blocks = Blocks(model, harness.layers, progress.folder)

    def sensitivities(self, windows: int) -> dict[str, np.ndarray]:
        """Path -> cost of each of gradients.SPARSITIES, over at most so many calibration windows."""
        tokens = self._windows[: min(windows, self._calibrating)]
        if not self._saved_costs():
            folder = self._progress.folder
            costs = gradients.sensitivities(self._blocks, self._harness, tokens, folder, self._on_progress)
            self._progress.save(**{f"costs/{path}": cost for path, cost in costs.items()})
        found = self._saved_costs()
        self.costs = {path: cost / (len(tokens) * self._half) for path, cost in found.items()}
        return found

    def _saved_costs(self) -> dict[str, np.ndarray]:
        """Path -> costs, in the order in which they were measured: layers of equal cost are taken in it."""
        saved = self._progress.arrays.items()
        return {name.removeprefix("costs/"): cost for name, cost in saved if name.startswith("costs/")}

    def measured(self, allocations: Sequence[Allocation], sparsity: float, effort: Effort) -> list[Candidate]:
        """The candidate of one allocation at a sparsity, measured in one pass over all blocks.

        The pass goes on where an interrupted one stopped.
        """
        (allocation,) = allocations
        candidate = Candidate(allocation.name, {}, note=allocation.note)
        states = self._restored(candidate)
        done = states.blocks

        def visit(number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
            if number < done:  # by the interrupted run, which kept the states after the last one
                return x if number < done - 1 else states.resumed(x.dtype)
            self._on_progress(number, len(self._blocks), "passing blocks")
            states.dense, counts = self._dense(run, x)
            before = {w: states.masked.get(w, x[w : w + 1]) for w in (*self._refining, *self._held_out)}
            found = self._sparsities(run, x[:1], allocation, counts)
            candidate.sparsities.update(found)
            chosen = self._refined(run, before, at(found, sparsity), effort.rounds if sparsity else 0)
            candidate.thresholds.update(chosen)
            states.masked, realised = self._masked(run, before, chosen)
            candidate.realised.update(realised)
            states.blocks = number + 1
            self._blocks.drop(number)
            self._save(states, candidate, paths)
            return states.dense

        self._blocks.walk(self._windows, visit)
        candidate.kl = self._kl(states)
        return [candidate]

    def _dense(self, run: Run, x: mx.array) -> tuple[mx.array, dict[str, np.ndarray]]:
        """All windows after a block, run dense, and the histograms of those to calibrate on."""
        with self._harness.counting(FIRST_TOKENS, x.shape[1]) as counts:
            out = through(run, x[: self._calibrating])
        check_counts(counts)
        self.counts.update(counts)
        return mx.concatenate([*out, *through(run, x[self._calibrating :])]), counts

    def _sparsities(
        self, run: Run, x: mx.array, allocation: Allocation, counts: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Path -> sparsity at each total, for the block's layers that may skip. x: a window before it."""
        may_skip = skippable(counts)
        if allocation.sparsities is not None:
            return allocation.over(may_skip)
        return greedy.search(lambda: run(x), self._harness, may_skip)[1] if may_skip else {}

    def _refined(
        self, run: Run, before: Mapping[int, mx.array], sparsities: Mapping[str, float], rounds: int
    ) -> dict[str, float]:
        """Thresholds at which the block's layers skip their sparsities while upstream and siblings skip."""

        def masked_pass(chosen: Mapping[str, float]) -> dict[str, np.ndarray]:
            with self._harness.counting(self._half, 2 * self._half) as seen:
                self._masked(run, {w: before[w] for w in self._refining}, chosen)
            return seen

        chosen = refined(self.counts, sparsities, rounds if sparsities else 0, masked_pass)
        return at_least_lossless(chosen, self.counts)

    def _masked(
        self, run: Run, before: Mapping[int, mx.array], chosen: Mapping[str, float]
    ) -> tuple[dict[int, mx.array], dict[str, float]]:
        """Windows after a block that skips channels behind the prompt; path -> fraction of the layer's
        inputs skipped, over the held-out ones.
        """
        rows = np.arange(2 * self._half)[None] >= self._half
        scored, after = probes.Masking(chosen), {}
        for w, h in before.items():
            masking = scored if w in self._held_out else probes.Masking(chosen)
            with self._harness.masked(masking, rows):
                after[w] = run(h)
                mx.eval(after[w])
            masking.evaluate()
        realised = scored.realised()
        return after, {path: realised.get(path, 0.0) for path in chosen}

    def _kl(self, states: _States) -> list[float]:
        """KL to dense of each held-out window, nats, from the hidden states after the last block."""
        assert states.dense is not None
        found = []
        for i, w in enumerate(self._held_out):
            self._on_progress(i, len(self._held_out), "scoring on held-out text")
            dense = scoring.Reference(self._predicted(w, states.dense[w : w + 1]))
            log_q = self._predicted(w, states.masked[w])
            found.append(float(scoring.divergence(dense, log_q).mean()))
        return found

    def _predicted(self, w: int, hidden: mx.array) -> scoring.Predictions:
        """Log-probabilities (1, half - 1, vocab) of a window's second half, its last token left out."""
        tokens = self._windows[w : w + 1, self._half : -1]
        return scoring.log_probabilities(self._blocks.logits(tokens, hidden[:, self._half : -1]))

    def _hidden_path(self, blocks: int) -> Path:
        return self._progress.folder / f".spqt-hidden-{blocks}.npz"

    def _save(self, states: _States, candidate: Candidate, paths: list[str]) -> None:
        """Note a block as done: first the hidden states after it, then what was found in its layers."""
        assert states.dense is not None
        with files.disk_errors(self._progress.folder):
            with self._hidden_path(states.blocks).open("wb") as file:
                masked = {f"sparse/{w}": host(h) for w, h in states.masked.items()}
                np.savez(file, allow_pickle=False, dense=host(states.dense), **masked)
            found = {f"counts/{path}": self.counts[path] for path in paths if path in self.counts}
            for path in set(paths) & set(candidate.thresholds):
                found[f"levels/{path}"] = candidate.sparsities[path]
                found[f"chosen/{path}"] = np.array([candidate.thresholds[path], candidate.realised[path]])
            self._progress.save(blocks=np.array(states.blocks), **found)
            self._hidden_path(states.blocks - 1).unlink(missing_ok=True)

    def _restored(self, candidate: Candidate) -> _States:
        """The states that an interrupted pass left, if they are whole, and its findings in `candidate`."""
        saved = self._progress.arrays
        done = int(saved.get("blocks", 0))
        try:
            with np.load(self._hidden_path(done), allow_pickle=False) as stored:
                arrays = {name: mx.array(stored[name]) for name in stored.files}
            dense = arrays.pop("dense")
        except Exception:  # numpy raises many kinds on a damaged archive; the blocks are then passed again
            return _States()
        for path in self.layers:
            if f"counts/{path}" in saved:
                self.counts[path] = saved[f"counts/{path}"]
            if f"chosen/{path}" in saved:
                candidate.sparsities[path] = saved[f"levels/{path}"]
                candidate.thresholds[path], candidate.realised[path] = saved[f"chosen/{path}"].tolist()
        return _States(done, dense, {int(name.removeprefix("sparse/")): h for name, h in arrays.items()})


def host(h: mx.array) -> np.ndarray:
    """Hidden states for saving: float32, which holds 16-bit types exactly."""
    return np.array(h.astype(mx.float32))
