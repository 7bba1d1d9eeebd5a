"""Goals other than a share: the highest sparsity whose cost on held-out text stays under a limit, the
lowest one that decodes fast enough.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spqt_cli.calibrate.measurements import OnStep
from spqt_cli.calibrate.methods import Search
from spqt_cli.errors import SpqtError

HIGHEST = 0.9
LEAST = 0.02  # under this, skipping is not worth the trouble
STEPS = 6  # halvings: the share is found to 1.5 points
MORE = 0.02  # added while settled thresholds, which skip a little less, are too slow

# (path -> threshold, share) -> tokens per second
Rate = Callable[[Mapping[str, float], float], float]


class OutOfReachError(SpqtError):
    """No share meets the goal (exit 3)."""


@dataclass(frozen=True)
class Goal:
    """A limit on one measure. kl: nats against dense, else the rise of perplexity, in percent."""

    limit: float
    kl: bool

    def cost(self, kl: float, rise: float) -> float:
        """kl: mean KL; rise: mean rise of -log p of the text, both in nats."""
        return kl if self.kl else 100 * math.expm1(rise)

    def __str__(self) -> str:
        return f"KL {self.limit:g}" if self.kl else f"perplexity +{self.limit:g}%"


def highest_share(search: Search, method: str, goal: Goal, on_step: OnStep) -> float:
    """The highest share, in whole percent, that meets the goal with the method's own allocation.

    Raises OutOfReachError with the cost of LEAST when not even that meets it.
    """
    candidate = search.candidates(method, on_step)[-1]

    def cost(share: float) -> float:
        chosen = search.bench.settled(search.counts, candidate.at(share), on_step)
        (score,) = search.bench.score([chosen], on_step)
        return goal.cost(score.mean_kl, score.mean_rise)

    if (least := cost(LEAST)) > goal.limit:
        unit = "nats" if goal.kl else "%"
        raise OutOfReachError(
            f"{goal} can't be met: skipping {LEAST:.0%} already costs {least:.3g} {unit}",
            "allow more, or leave the model dense",
        )
    low, high = LEAST, HIGHEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= goal.limit else (low, middle)
    return math.floor(low * 100 + 1e-9) / 100


def lowest_share(
    search: Search, method: str, wanted: float, rate: Rate, on_step: OnStep
) -> tuple[float, float]:
    """The lowest share, in whole percent, that decodes `wanted` tokens per second, and the rate there.

    Shares are tried with the dense pass's thresholds; the last one is settled and measured again. 0 where
    the dense model is fast enough. Raises OutOfReachError with the best found when no share is.
    """
    candidate = search.candidates(method, on_step)[-1]
    seen: dict[float, float] = {}

    def measured(share: float, settle: bool = False) -> float:
        on_step("measuring decode speed")
        shares = candidate.at(share)
        if settle:
            chosen = search.bench.settled(search.counts, shares, on_step)
        else:
            chosen = search.bench.dense_thresholds(search.counts, shares)
        seen[share] = rate(chosen if share else {}, share)
        return seen[share]

    if measured(0.0) >= wanted:
        return 0.0, seen[0.0]
    if measured(HIGHEST) >= wanted:
        share = _bracketed(measured, wanted, seen)
        while share <= HIGHEST:
            if measured(share, settle=True) >= wanted:
                return share, seen[share]
            share = round(share + MORE, 2)
    best = max(seen, key=lambda share: seen[share])
    raise OutOfReachError(
        f"{wanted:g} tokens/s can't be met on this machine: the best found is {seen[best]:.1f} "
        f"at {best:.0%} skipped, {seen[0.0]:.1f} dense",
        "ask for less, or take a smaller model",
    )


def _bracketed(measured: Callable[[float], float], wanted: float, seen: Mapping[float, float]) -> float:
    """The lowest share found that is fast enough, where 0 is not and HIGHEST is.

    Time per token is nearly a straight line over the share, so each try is where the line through the
    ends meets the goal, but never so near an end that the bracket would hardly shrink.
    """
    low, high = 0.0, HIGHEST
    for _ in range(STEPS):
        if high - low < 0.015:
            break
        slow, fast = 1 / seen[low], 1 / seen[high]
        guess = low + (high - low) * (slow - 1 / wanted) / (slow - fast)
        margin = 0.1 * (high - low)
        share = round(min(max(guess, low + margin), high - margin), 2)
        if share in seen:
            break
        low, high = (low, share) if measured(share) >= wanted else (share, high)
    return high
