"""Calibration of a model that does not fit in memory: one block of weights is loaded at a time.

All windows pass through a block together, twice: dense, as histograms see them, and with channels
skipped upstream, as thresholds are settled. Their hidden states are kept, the block's weights are
dropped, and the next block's are read (blocks.py). For `fast` a few windows go through all blocks
before, forwards and backwards (gradients.py). Progress is saved block by block.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate import greedy
from spqt_cli.calibrate.measurements import (
    FIRST_TOKENS,
    SETTLING_ROUNDS,
    SETTLING_WINDOWS,
    OnStep,
    Workbench,
    check_counts,
)
from spqt_cli.calibrate.methods import Candidate, allocated
from spqt_cli.calibrate.stream.blocks import Chain, Run
from spqt_cli.calibrate.stream.gradients import Backwards
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import probes, scoring
from spqt_cli.system import files

GRADIENT_WINDOWS = 4  # more change KL by under 1 % (docs/quality.md)


class Stream:
    """One pass over a probed, lazily loaded model: histograms, allocation and thresholds, block by block."""

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self.harness, self.progress = bench.harness, bench.progress
        self.folder, self.target = folder, 0.0
        self.chain = Chain(bench.model, bench.harness, folder)
        self._windows = np.concatenate([bench.rows, bench.held_out])
        self._held_out = range(len(bench.rows), len(self._windows))
        self._settling = range(min(SETTLING_WINDOWS, len(bench.rows)))
        self._done = 0
        self._dense: mx.array | None = None  # (windows, window, width) after the last block that is done
        self._sparse: dict[int, mx.array] = {}  # window -> (1, window, width), with channels skipped
        self.counts: dict[str, np.ndarray] = {}
        self.candidate = Candidate("", {})
        self._allocated: dict[str, np.ndarray] = {}

    def steps(self, method: str) -> int:
        """How often a run of the method reports a step."""
        return (3 if method == "fast" else 1) * len(self.chain.blocks) + len(self._held_out)

    def run(
        self, method: str, target: float, on_step: OnStep
    ) -> tuple[dict[str, np.ndarray], list[Candidate]]:
        """Path -> histogram, and the one candidate: thresholds, shares and cost on held-out text.

        method: one of paging.METHODS. target: the share to skip, 0 to 0.95.
        Raises UnsupportedError for a model whose blocks are not a chain.
        """
        self.target, self.candidate.name = target, method
        self._restore()
        if method == "fast" and target:
            self.candidate.name, self._allocated = "gradient", self._priced(on_step)

        def visit(number: int, run: Run, x: mx.array, paths: list[str]) -> mx.array:
            return self._visit(number, run, x, paths, on_step)

        self.chain.walk(self._windows, visit)
        self._score(on_step)
        return {path: self.counts[path] for path in self.harness.layers if path in self.counts}, [
            self.candidate
        ]

    def _priced(self, on_step: OnStep) -> dict[str, np.ndarray]:
        """Path -> the layer's share at each total, by gradients; as an interrupted run left them."""
        saved = self.progress.arrays
        names = {f"shares/{path}": path for path in self.harness.layers}
        if not names.keys() & saved.keys():
            rows = self._windows[: min(GRADIENT_WINDOWS, self._held_out.start)]
            costs = Backwards(self.chain, self.harness, rows, self.folder).costs(on_step)
            layers = self.harness.layers
            found = allocated(costs, {path: layers[path].inputs * layers[path].outputs for path in costs})
            self.progress.save(**{f"shares/{path}": levels for path, levels in found.items()})
        return {path: saved[name] for name, path in names.items() if name in saved}

    def _visit(self, number: int, run: Run, x: mx.array, paths: list[str], on_step: OnStep) -> mx.array:
        """A block's turn: the dense hidden states (windows, window, width) after it."""
        if number < self._done:
            # as the interrupted run left it; those between are not kept
            return self._dense if number == self._done - 1 and self._dense is not None else x
        on_step("passing blocks")
        self._dense = self._pass(run, x, paths)
        self.chain.drop(number)
        self._save(number + 1, paths)
        return self._dense

    def _pass(self, run: Run, x: mx.array, paths: list[str]) -> mx.array:
        """Both passes of all windows through one block; its thresholds are chosen in between."""
        harness, half = self.harness, self._windows.shape[1] // 2
        harness.counting, harness.first, harness.length = True, FIRST_TOKENS, x.shape[1]
        dense = []
        for w in range(len(self._windows)):
            harness.counting = w not in self._held_out
            dense.append(run(x[w : w + 1]))
            mx.eval(dense[-1])
        harness.counting = False
        counts = harness.histograms()
        for path, seen in counts.items():
            check_counts(path, seen)
        self.counts.update(counts)
        levels = self._levels(run, x[:1], {p: c for p, c in counts.items() if not thresholds.is_dead(c)})
        before = {w: self._sparse.get(w, x[w : w + 1]) for w in (*self._settling, *self._held_out)}
        chosen = self._settled(run, before, counts, levels)
        realised = probes.Masking(chosen)
        for w, h in before.items():
            masking = realised if w in self._held_out else probes.Masking(chosen)
            self._sparse[w] = self._masked(run, h, masking, half)
        self.candidate.chosen.update(chosen)
        shares = realised.realised()
        self.candidate.realised.update({path: shares.get(path, 0.0) for path in chosen})
        return mx.concatenate(dense)

    def _levels(self, run: Run, x: mx.array, live: dict[str, np.ndarray]) -> dict[str, float]:
        """Path -> the layer's share at the target; dead layers have none and stay dense."""
        if self.candidate.name == "paper" and live:
            search = greedy.Search(lambda: run(x), run(x), self.harness, live)
            layers = self.harness.layers
            found = search.run({path: layers[path].inputs * layers[path].outputs for path in live})
        else:
            even = np.array(CURVE_SPARSITIES)
            found = {path: self._allocated.get(path, even) for path in live}
        self.candidate.levels.update(found)
        target = self.target
        return {path: float(np.interp(target, CURVE_SPARSITIES, shares)) for path, shares in found.items()}

    def _settled(
        self,
        run: Run,
        before: dict[int, mx.array],
        counts: dict[str, np.ndarray],
        levels: dict[str, float],
    ) -> dict[str, float]:
        """Thresholds at which the layers skip their levels while upstream skips, and siblings too."""
        half = self._windows.shape[1] // 2
        chosen = quantiles(counts, levels)
        for _ in range(SETTLING_ROUNDS if self.target and levels else 0):
            self.harness.counting, self.harness.first = True, half
            for w in self._settling:
                self._masked(run, before[w], probes.Masking(chosen), half)
            self.harness.counting = False
            seen = self.harness.histograms()
            chosen |= quantiles(seen, {path: levels[path] for path in levels if path in seen})
        return {path: max(t, thresholds.lossless(counts[path])) for path, t in chosen.items()}

    def _masked(self, run: Run, h: mx.array, masking: probes.Masking, half: int) -> mx.array:
        """h (1, window, width) through the block, dense for a prompt of `half` and sparse from there on."""
        masking.rows = np.arange(h.shape[1])[None] >= half
        self.harness.masking = masking
        out = run(h)
        mx.eval(out)
        masking.evaluate()
        self.harness.masking = None
        return out

    def _score(self, on_step: OnStep) -> None:
        """KL to dense on the held-out windows, from the hidden states after the last block."""
        half = self._windows.shape[1] // 2
        assert self._dense is not None
        for w in self._held_out:
            on_step("scoring on held-out text")
            dense = scoring.Reference(self._predicted(w, self._dense[w : w + 1, half:-1]))
            log_q = self._predicted(w, self._sparse[w][:, half:-1])
            self.candidate.kl.append(float(scoring.divergence(dense, log_q).mean()))

    def _predicted(self, w: int, hidden: mx.array) -> np.ndarray:
        """What norm and head make of hidden (1, rows, width): log-probabilities (1, rows, vocab)."""
        half = self._windows.shape[1] // 2
        return scoring.log_probabilities(self.chain.logits(self._windows[w : w + 1, half:-1], hidden))

    def _hidden_path(self, number: int) -> Path:
        return self.folder / f".spqt-hidden-{number}.npz"

    def _save(self, number: int, paths: list[str]) -> None:
        """Note a block as done: first the hidden states after it, then what was found in it."""
        assert self._dense is not None
        with files.disk_errors(self.folder):
            with self._hidden_path(number).open("wb") as file:
                sparse = {f"sparse/{w}": host(h) for w, h in self._sparse.items()}
                np.savez(file, allow_pickle=False, dense=host(self._dense), **sparse)
            one = self.candidate
            found = {f"counts/{path}": self.counts[path] for path in paths if path in self.counts}
            for path in set(paths) & set(one.chosen):
                found[f"levels/{path}"] = one.levels[path]
                found[f"chosen/{path}"] = np.array([one.chosen[path], one.realised[path]])
            self.progress.save(blocks=np.array(number), **found)
            self._hidden_path(number - 1).unlink(missing_ok=True)

    def _restore(self) -> None:
        """Take up an interrupted run, if there is one and its hidden states are whole."""
        saved = self.progress.arrays
        done = int(saved.get("blocks", 0))
        try:
            with np.load(self._hidden_path(done), allow_pickle=False) as stored:
                arrays = {name: mx.array(stored[name]) for name in stored.files}
            self._dense = arrays.pop("dense")
        except Exception:  # numpy raises many kinds on a damaged archive; the blocks are then passed again
            return
        self._done = done
        self._sparse = {int(name.removeprefix("sparse/")): h for name, h in arrays.items()}
        for path in self.harness.layers:
            if f"counts/{path}" in saved:
                self.counts[path] = saved[f"counts/{path}"]
            if f"chosen/{path}" in saved:
                self.candidate.levels[path] = saved[f"levels/{path}"]
                threshold, share = saved[f"chosen/{path}"].tolist()
                self.candidate.chosen[path], self.candidate.realised[path] = threshold, share


def quantiles(counts: dict[str, np.ndarray], levels: dict[str, float]) -> dict[str, float]:
    """Path -> the threshold below which the layer's level of its inputs lies."""
    return {path: float(thresholds.quantile(counts[path], [level])[0]) for path, level in levels.items()}


def host(h: mx.array) -> np.ndarray:
    """Hidden states for saving: float32, which holds 16-bit types exactly."""
    return np.array(h.astype(mx.float32))
