"""Goals other than a share: the highest sparsity whose cost on held-out text stays under a limit."""

import math
from dataclasses import dataclass

from spqt_cli.errors import SpqtError
from spqt_cli.methods import Search
from spqt_cli.workbench import OnStep

HIGHEST = 0.9
LEAST = 0.02  # under this, skipping is not worth the trouble
STEPS = 6  # halvings: the share is found to 1.5 points


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

    Raises SpqtError with the cost of LEAST when not even that meets it.
    """
    candidate = search.candidates(method, on_step)[-1]

    def cost(share: float) -> float:
        chosen = search.bench.settled(search.counts, candidate.at(share), on_step)
        (score,) = search.bench.score([chosen], on_step)
        return goal.cost(score.mean_kl, score.mean_rise)

    if (least := cost(LEAST)) > goal.limit:
        unit = "nats" if goal.kl else "%"
        raise SpqtError(
            f"{goal} can't be met: skipping {LEAST:.0%} already costs {least:.3g} {unit}",
            "allow more, or leave the model dense",
        )
    low, high = LEAST, HIGHEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= goal.limit else (low, middle)
    return math.floor(low * 100 + 1e-9) / 100
