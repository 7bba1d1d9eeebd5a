"""What an evaluation of several models on several texts found, and its tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spqt_cli.errors import UsageError
from spqt_cli.evaluate.report import DENSE, ROWS, SOURCE, Variant, shown
from spqt_cli.measure import scoring

NARROWEST = 14  # characters of the column of names


@dataclass(frozen=True)
class Paired:
    """A variant less another on the same windows, in nats: the mean over windows and its standard error.

    Of the KL to the source; without a source, of the mean surprise per token (ln of the perplexity).
    """

    name: str
    mean: float
    se: float


@dataclass
class Compared(Variant):
    """A variant of one of several models. name: unique among all.

    model: its label, SOURCE, ROWS or a peer's. bytes_per_token: of weights that a step reads, by the
    realised sparsity, numbers that are not packed as 16-bit ones. less: held against a chosen variant.
    """

    model: str = ""
    bytes_per_token: float = 0.0
    less: Paired | None = None

    @property
    def title(self) -> str:
        """The variant's name in tables."""
        return self.name


@dataclass
class TextResult:
    """All variants on one text: `scored` positions in `windows` windows of `window` tokens."""

    text: str
    text_sha256: str
    windows: int
    window: int
    scored: int
    variants: list[Compared]

    def table(self) -> str:
        """One line per variant, 80 columns wide where names are short."""
        with_source = any(SOURCE in row.against for row in self.variants)
        against = next((row.less.name for row in self.variants if row.less), "")
        width = max(NARROWEST, *(len(row.name) + 1 for row in self.variants))
        held = f"less {against}" if against else ""
        lines = [
            f"{self.text}: {self.scored} positions scored in {self.windows} windows of {self.window}",
            f"{'':<{width}}{'MB/token':>9}{'skipped':>9}{'perplexity':>11}"
            f"{'KL source' if with_source else 'KL dense':>16}{held:>18}".rstrip(),
        ]
        for row in self.variants:
            one = row.against.get(SOURCE if with_source else DENSE)
            kl = f"{one.kl:.4f} ± {shown(one.se, 4)}" if one else ""
            less = f"{row.less.mean:+.4f} ± {shown(row.less.se, 4)}" if row.less else ""
            skipped = f"{row.realised:.1%}" if row.sparsity else ""
            size = f"{row.bytes_per_token / 1e6:.1f}"
            lines.append(
                f"{row.name:<{width}}{size:>9}{skipped:>9}{row.perplexity:>11.2f}{kl:>16}{less:>18}".rstrip()
            )
        return "\n".join(lines)


@dataclass
class Several:
    """Results on all texts. models: label -> folder. against: the variant that others are held against."""

    models: dict[str, str]
    against: str
    texts: list[TextResult]
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A table per text, and a line on what the errors are."""
        what = (
            "KL source" if any(SOURCE in row.against for row in self.texts[0].variants) else "ln perplexity"
        )
        foot = "± standard errors over windows"
        if any(row.less for one in self.texts for row in one.variants):
            foot += f"; less: of {what}, paired by window"
        stored = "MB/token: as stored; where a backend reads more, run and compare count it"
        return "\n\n".join(one.table() for one in self.texts) + "\n".join(["\n", foot, stored, *self.notes])


def hold_against(results: Sequence[TextResult], asked: str | None) -> str:
    """Set every variant's `less`, and return the name of the one that they are held against.

    asked: its name; None takes the row-grouped one, or the first dense one. Raises UsageError for a name
    that is not there.
    """
    names = [row.name for row in results[0].variants]
    dense = [row.name for row in results[0].variants if row.sparsity is None and row.name != SOURCE]
    chosen = asked or (ROWS if ROWS in names else dense[0])
    check_against(chosen, names)
    for result in results:
        reference = _means(next(row for row in result.variants if row.name == chosen))
        for row in result.variants:
            if row.name not in (chosen, SOURCE):
                gained = _means(row) - reference
                row.less = Paired(chosen, float(gained.mean()), scoring.standard_error(gained))
    return chosen


def check_against(asked: str, names: Sequence[str]) -> None:
    """Refuse a variant that is not measured."""
    if asked not in names or asked == SOURCE:
        others = ", ".join(name for name in names if name != SOURCE)
        raise UsageError(f"there is no variant {asked!r} to hold others against", f"one of: {others}")


def _means(row: Compared) -> np.ndarray:
    held = row.against.get(SOURCE)
    return np.array(held.windows if held else row.window_surprise)
