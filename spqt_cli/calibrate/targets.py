"""Targets other than a sparsity: the highest one whose cost on held-out text stays under a limit, the
lowest one that decodes fast enough.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spqt_cli.calibrate.measurements import OnProgress, Repeatable, quantiles
from spqt_cli.calibrate.methods import Method, allocations
from spqt_cli.errors import SpqtError

HIGHEST = 0.9
LEAST = 0.02  # under this, skipping is not worth the trouble
STEPS = 6  # halvings: the sparsity is found to 1.5 points
MORE = 0.02  # added while refined thresholds, which skip a little less, are too slow

# (path -> threshold, sparsity) -> tokens per second
Rate = Callable[[Mapping[str, float], float], float]


class OutOfReachError(SpqtError):
    """No sparsity meets the target (exit 3)."""


@dataclass(frozen=True)
class Limit:
    """A limit on one measure. kl: nats against dense, else the rise of perplexity, in percent."""

    value: float
    kl: bool

    def cost(self, kl: float, rise: float) -> float:
        """kl: mean KL; rise: mean rise of -log p of the text, both in nats."""
        return kl if self.kl else 100 * math.expm1(rise)

    def __str__(self) -> str:
        return f"KL {self.value:g}" if self.kl else f"perplexity +{self.value:g}%"


def highest_sparsity(measurements: Repeatable, method: Method, limit: Limit) -> float:
    """The highest sparsity, in whole percent, that meets the limit with the method's own allocation.

    Raises OutOfReachError with the cost of LEAST when not even that meets it.
    """
    candidate = measurements.candidate(allocations(measurements, method)[-1])

    def cost(sparsity: float) -> float:
        (score,) = measurements.score([measurements.refined(candidate.at(sparsity))])
        return limit.cost(score.mean_kl, score.mean_rise)

    if (least := cost(LEAST)) > limit.value:
        unit = "nats" if limit.kl else "%"
        raise OutOfReachError(
            f"{limit} can't be met: skipping {LEAST:.0%} already costs {least:.3g} {unit}",
            "allow more, or leave the model dense",
        )
    low, high = LEAST, HIGHEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit.value else (low, middle)
    return math.floor(low * 100 + 1e-9) / 100


def lowest_sparsity(
    measurements: Repeatable, method: Method, wanted: float, rate: Rate, on_progress: OnProgress
) -> tuple[float, float]:
    """The lowest sparsity, in whole percent, that decodes `wanted` tokens per second, and the rate there.

    Sparsities are tried with the dense pass's thresholds; the last one is refined and measured again. 0
    where the dense model is fast enough. Raises OutOfReachError with the best found when none is.
    """
    candidate = measurements.candidate(allocations(measurements, method)[-1])
    seen: dict[float, float] = {}

    def measured(sparsity: float, refine: bool = False) -> float:
        on_progress(len(seen), len(seen) + 1, "measuring decode speed")  # one more at least
        layers = candidate.at(sparsity)
        chosen = measurements.refined(layers) if refine else quantiles(measurements.skippable, layers)
        seen[sparsity] = rate(chosen if sparsity else {}, sparsity)
        return seen[sparsity]

    if measured(0.0) >= wanted:
        return 0.0, seen[0.0]
    if measured(HIGHEST) >= wanted:
        sparsity = _bracketed(measured, wanted, seen)
        while sparsity <= HIGHEST:
            if measured(sparsity, refine=True) >= wanted:
                return sparsity, seen[sparsity]
            sparsity = round(sparsity + MORE, 2)
    best = max(seen, key=lambda sparsity: seen[sparsity])
    raise OutOfReachError(
        f"{wanted:g} tokens/s can't be met on this machine: the best found is {seen[best]:.1f} "
        f"at {best:.0%} skipped, {seen[0.0]:.1f} dense",
        "ask for less, or take a smaller model",
    )


def _bracketed(measured: Callable[[float], float], wanted: float, seen: Mapping[float, float]) -> float:
    """The lowest sparsity found that is fast enough, where 0 is not and HIGHEST is.

    Time per token is nearly a straight line over the sparsity, so each try is where the line through the
    ends meets the wanted rate, but never so near an end that the bracket would hardly shrink.
    """
    low, high = 0.0, HIGHEST
    for _ in range(STEPS):
        if high - low < 0.015:
            break
        slow, fast = 1 / seen[low], 1 / seen[high]
        guess = low + (high - low) * (slow - 1 / wanted) / (slow - fast)
        margin = 0.1 * (high - low)
        sparsity = round(min(max(guess, low + margin), high - margin), 2)
        if sparsity in seen:
            break
        low, high = (low, sparsity) if measured(sparsity) >= wanted else (sparsity, high)
    return high
