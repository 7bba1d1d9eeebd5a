"""What a calibration is asked for, and whether it loads the model or one block at a time."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from spqt_cli.calibrate.methods import METHODS, STREAMED_METHODS
from spqt_cli.calibrate.targets import Limit
from spqt_cli.errors import UsageError
from spqt_cli.format import thresholds

MIN_WINDOW = 32
WINDOW = 512  # tokens, where none are asked for


@dataclass(frozen=True)
class CalibrateOptions:
    """sparsity: fraction of the weights to skip, None for the default of the model's size. data: a text
    file, None for the shipped one. tokens: of text run in all, a quarter of them held out to check the
    result. window: tokens per sequence, the first half a prompt; None: 512, or what the context
    allows. seed: picks the windows. method: a key of methods.METHODS. restart: drop an unfinished run's
    progress.
    max_kl, max_ppl_increase: instead of a sparsity, the highest one whose KL to dense (nats) or rise of
    perplexity (percent) on held-out text stays under this. min_tokens_per_second: instead, the lowest
    one that decodes so fast on this machine. stream: load one block of weights at a time; None: if the
    weights don't fit in memory.
    """

    sparsity: float | None = None
    data: Path | None = None
    tokens: int = 4096
    window: int | None = None
    seed: int = 0
    method: str = "auto"
    restart: bool = False
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_tokens_per_second: float | None = None
    stream: bool | None = None

    def check(self) -> None:
        """Raise UsageError (2) for values out of range or that exclude one another."""
        limits = (self.max_kl, self.max_ppl_increase, self.min_tokens_per_second)
        if sum(target is not None for target in (self.sparsity, *limits)) > 1:
            raise UsageError(
                "a sparsity, a KL, a rise of perplexity and a speed exclude one another", "give one of them"
            )
        if any(limit is not None and not (limit > 0 and math.isfinite(limit)) for limit in limits):
            raise UsageError(
                "a KL, a rise of perplexity or a speed must be a positive number", "--max-kl 0.1"
            )
        thresholds.check_sparsity(self.sparsity)
        if self.method not in METHODS:
            raise UsageError(f"there is no method {self.method!r}", f"use one of: {', '.join(METHODS)}")
        window = self.window or WINDOW
        if min(self.tokens // 2, window) < MIN_WINDOW:
            raise UsageError(
                f"{self.tokens} tokens in windows of {window} are too few",
                f"use at least {2 * MIN_WINDOW} tokens and windows of {MIN_WINDOW}",
            )

    def limit(self) -> Limit | None:
        """The limit on the cost, if one was given."""
        if self.max_kl is not None:
            return Limit(self.max_kl, kl=True)
        if self.max_ppl_increase is not None:
            return Limit(self.max_ppl_increase, kl=False)
        return None

    def streamed(self) -> "CalibrateOptions":
        """These options with what can be done block by block; a line on stderr says what can't.

        Raises UsageError (2) for a limit.
        """
        if self.limit() is not None or self.min_tokens_per_second is not None:
            raise UsageError(
                "a limit is found in many passes, for which the model must fit in memory",
                "give --sparsity instead",
            )
        if self.method in STREAMED_METHODS:
            return replace(self, stream=True)
        note(
            f"method {self.method} measures candidates with the whole model in memory; block by block the "
            "method is fast: sparsities by gradients, not compared with uniform ones"
        )
        return replace(self, stream=True, method="fast")


def note(line: str) -> None:
    """Print a line for the user on stderr."""
    print(f"note: {line}", file=sys.stderr)
