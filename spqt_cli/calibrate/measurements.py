"""What a calibration measures on a model, and what it finds: the one interface of both engines.

`Measurements` is all that methods know of a model. InMemory (memory.py) holds the whole model and runs
it as often as asked. Streamed (stream/engine.py) loads one block of weights at a time and runs all
windows through it before it loads the next.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from spqt_cli.decode.layers import ZigzagLayer
from spqt_cli.errors import SpqtError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES

FIRST_TOKENS = 8  # of each sequence, left out: the attention sink's huge values are no guide to the rest
REFINING_WINDOWS = 4
REFINING_ROUNDS = 2  # the second changes realised sparsity by some tenths of a point, a third by none

OnProgress = Callable[[float, float, str], None]  # (done, total, what is being done), once per unit of work


@dataclass(frozen=True)
class Allocation:
    """How a model's sparsity is spread over its layers.

    name: stands in config.json. sparsities: path -> the layer's sparsity at each total of CURVE_SPARSITIES:
    (50,), rising; a layer left out takes the total. None: searched block by block (greedy.py).
    note: one line for the user where the method asked for another allocation, or "".
    """

    name: str
    sparsities: Mapping[str, np.ndarray] | None = field(default_factory=dict)
    note: str = ""

    def over(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """Path -> the layer's sparsity at each total; of an allocation that needs no search."""
        assert self.sparsities is not None
        return {path: self.sparsities.get(path, np.array(CURVE_SPARSITIES)) for path in paths}


@dataclass(frozen=True)
class Effort:
    """How much of the text a method runs.

    gradient_windows: at most so many are differentiated. rounds: of refining thresholds.
    second_windows: thresholds are refined on so many at a second sparsity (curves.py); 0: at none.
    """

    gradient_windows: int = 0
    rounds: int = REFINING_ROUNDS
    second_windows: int = REFINING_WINDOWS


@dataclass
class Candidate:
    """One allocation and what was measured with it.

    sparsities: as Allocation.over gives them, without layers that stay dense. thresholds: path -> threshold
    at the target. kl: mean per held-out window, nats, against the dense quantized model. realised: path ->
    fraction of the layer's inputs skipped on held-out text. second: another sparsity and the
    thresholds refined there, or None. note: the allocation's.
    """

    name: str
    sparsities: dict[str, np.ndarray]
    thresholds: dict[str, float] = field(default_factory=dict)
    kl: list[float] = field(default_factory=list)
    realised: dict[str, float] = field(default_factory=dict)
    second: tuple[float, dict[str, float]] | None = None
    note: str = ""

    def at(self, total: float) -> dict[str, float]:
        """Path -> the layer's sparsity where the model's is `total` (0 to 0.98)."""
        return at(self.sparsities, total)

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))


@dataclass
class Score:
    """What some thresholds cost on held-out text: per window, KL to dense and the rise of the text's mean
    -log p, in nats. realised: path -> fraction of the layer's inputs skipped.
    """

    kl: list[float] = field(default_factory=list)
    rise: list[float] = field(default_factory=list)
    realised: dict[str, float] = field(default_factory=dict)

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))

    @property
    def mean_rise(self) -> float:
        return float(np.mean(self.rise))


class Measurements(Protocol):
    """What both engines measure on a probed model, over windows to calibrate on and windows held out.

    costs: path -> KL to dense, in nats a token, that each of gradients.SPARSITIES of this layer alone would
    cause; empty before `sensitivities`.
    """

    costs: dict[str, np.ndarray]

    @property
    def layers(self) -> Mapping[str, ZigzagLayer]:
        """Path -> layer, of all Zigzag layers."""

    @property
    def counts(self) -> Mapping[str, np.ndarray]:
        """Path -> counts of |x| per bin, (BINS,), over a dense pass; only layers that the text reached.

        Streamed knows them after `measured`.
        """

    def sensitivities(self, windows: int) -> dict[str, np.ndarray]:
        """Path -> cost of each of gradients.SPARSITIES, over at most so many calibration windows.

        Raises UnsupportedError where the model has no gradients.
        """

    def measured(self, allocations: Sequence[Allocation], sparsity: float, effort: Effort) -> list[Candidate]:
        """The candidates that these allocations make at a sparsity (0 to 0.95), the one of least KL first.

        Streamed takes one allocation. Raises UnsupportedError for a model that can't be measured this way.
        """


class Repeatable(Measurements, Protocol):
    """What a search for a target needs besides: the parts of `measured`, at any sparsity."""

    @property
    def skippable(self) -> Mapping[str, np.ndarray]:
        """The histograms of the layers that may skip channels."""

    def candidate(self, allocation: Allocation) -> Candidate:
        """An allocation over this model's layers, unmeasured."""

    def refined(self, sparsities: Mapping[str, float]) -> dict[str, float]:
        """Path -> the threshold at which the layer skips its sparsity while all others skip theirs."""

    def score(self, choices: Sequence[Mapping[str, float]]) -> list[Score]:
        """What each choice of thresholds (path -> threshold) costs on the held-out windows."""


def skippable(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The histograms of the layers that may skip channels; all others stay dense.

    The only place that decides it. Left out are layers with constant inputs.
    """
    return {path: seen for path, seen in counts.items() if not thresholds.is_dead(seen)}


def at(sparsities: Mapping[str, np.ndarray], total: float) -> dict[str, float]:
    """Path -> the layer's sparsity where the model's is `total`."""
    return {path: float(np.interp(total, CURVE_SPARSITIES, each)) for path, each in sparsities.items()}


def quantiles(counts: Mapping[str, np.ndarray], sparsities: Mapping[str, float]) -> dict[str, float]:
    """Path -> the threshold under which that fraction of the layer's inputs lies."""
    return {path: float(thresholds.quantile(counts[path], [s])[0]) for path, s in sparsities.items()}


def refined(
    counts: Mapping[str, np.ndarray],
    sparsities: Mapping[str, float],
    rounds: int,
    masked_pass: Callable[[Mapping[str, float]], Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """Path -> the threshold at which a layer skips its sparsity while the others skip theirs.

    Skipping upstream shrinks what comes later, so the thresholds of a dense pass skip too much: each
    round takes them from the histograms of a pass with the last round's.

    counts: of a dense pass. masked_pass: thresholds -> histograms of a pass with them.
    """
    found = quantiles(counts, sparsities)
    for _ in range(rounds):
        seen = masked_pass(found)
        found |= quantiles(seen, {path: s for path, s in sparsities.items() if path in seen})
    return found


def at_least_lossless(chosen: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Path -> the threshold, raised to where it skips the layer's exact zeros."""
    return {path: max(value, thresholds.lossless(counts[path])) for path, value in chosen.items()}


def check_counts(counts: Mapping[str, np.ndarray]) -> None:
    """Raise SpqtError for a histogram with infinities or NaN in it."""
    for path, seen in counts.items():
        if seen[thresholds.FINITE_BINS :].any():
            raise SpqtError(
                f"layer {path}: infinite or undefined inputs while running the text",
                "the weights may be damaged: spqt verify, or convert again in another dtype",
            )


def add(total: dict[str, np.ndarray], more: Mapping[str, np.ndarray]) -> None:
    """Add histograms to a total."""
    for path, seen in more.items():
        total[path] = total[path] + seen if path in total else seen
