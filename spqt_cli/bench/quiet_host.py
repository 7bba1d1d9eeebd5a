"""Whether the host left a benchmark alone, and how fast a variant was in the repetitions where it did.

Decoding on a GPU waits for Python at every token, so a neighbour on the host's cores slows each variant
by its own share of Python, and ratios swing. A fixed piece of pure Python, timed right before and after
every sample, tells. It knows no models, makes no tables, and drops nothing: it only adds a second figure.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS = 10_000  # of the loop: a few hundred microseconds
LOOPS = 5  # timed at one look; the median leaves out a single interruption
LIMIT = 1.25  # times the run's fastest look; a neighbour was seen to double it
LEAST = 2  # quiet repetitions that make a figure: one says nothing about its spread


def loop_us() -> float:
    """Microseconds that a fixed pure-Python loop takes now: the median of LOOPS."""
    return statistics.median(_timed() for _ in range(LOOPS)) * 1e6


def _timed() -> float:
    start, total = time.perf_counter(), 0
    for number in range(ROUNDS):
        total += number & 7
    return time.perf_counter() - start


@dataclass(frozen=True)
class Quiet:
    """Which repetitions of a test ran on a quiet host. each: of every one; ratios: to stock, likewise."""

    each: list[bool]
    ratios: list[float]

    @property
    def samples(self) -> list[float]:
        """The ratios to stock of the quiet repetitions."""
        return [ratio for ratio, quiet in zip(self.ratios, self.each, strict=True) if quiet]

    def text(self) -> str:
        """For a table: median and range, and of how many repetitions."""
        found = self.samples
        if all(self.each):
            return f"all {len(self.each)}"
        if len(found) < LEAST:
            return f"{len(found) or 'none'} of {len(self.each)}: no figure"
        median = statistics.median(found)
        return f"{len(found)} of {len(self.each)}: {median:.2f}x ({min(found):.2f}-{max(found):.2f})"

    def plain(self) -> dict[str, Any]:
        """As plain values; the figures are None where fewer than LEAST repetitions were quiet."""
        found = self.samples
        enough = len(found) >= LEAST
        return {
            "repetitions": len(found), "of": len(self.each),
            "median": statistics.median(found) if enough else None,
            "min": min(found) if enough else None, "max": max(found) if enough else None,
            "each": self.each,
        }  # fmt: skip


class Watch:
    """The looks at the host in one benchmark run."""

    def __init__(self) -> None:
        self.seen_us: list[float] = []

    def look(self) -> float:
        """Microseconds of the loop now."""
        self.seen_us.append(loop_us())
        return self.seen_us[-1]

    @property
    def fastest_us(self) -> float:
        """The fastest look so far, those beside uncounted samples included."""
        return min(self.seen_us)

    def quiet(self, looks_us: Sequence[Sequence[tuple[float, float]]]) -> list[bool]:
        """Of each repetition, whether no look beside these samples took over LIMIT times the fastest.

        looks_us: of each variant, (before, after) of its sample in each repetition. Ask when the run is
        over: only then is the fastest look known.
        """
        repetitions = zip(*looks_us, strict=True)
        limit = LIMIT * self.fastest_us
        return [all(max(pair) <= limit for pair in pairs) for pairs in repetitions]

    def note(self, each: Sequence[bool]) -> str:
        """One line for people about all repetitions of the run. each: of every test, as `quiet` tells."""
        disturbed = len(each) - sum(each)
        fastest = f"{LIMIT} times its fastest, {self.fastest_us:.0f} us"
        if not disturbed:
            return (
                f"the host was quiet in all {len(each)} repetitions: "
                f"a fixed Python loop beside each sample took at most {fastest}"
            )
        return (
            f"the host was disturbed in {disturbed} of {len(each)} repetitions: a fixed Python loop beside "
            f"a sample took over {fastest}; 'quiet host' is x stock without such samples, ours or stock's"
        )
