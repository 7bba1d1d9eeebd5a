"""What an evaluation found, on a text or on questions, and the tables that show it."""

import math
from dataclasses import dataclass, field

from spqt_cli.measure import scoring

SOURCE, DENSE, ROWS = "source", "dense", "row-grouped"  # names of variants; the others are sparsities
BAR = 40  # characters of the longest bar


@dataclass
class Variant:
    """One way to run the model. sparsity: asked for; realised: share of Zigzag weights skipped over
    the scored positions, 0 to 1. against: reference -> KL and agreement. layers: realised per layer.
    """

    name: str
    sparsity: float | None
    realised: float
    perplexity: float
    perplexity_se: float
    window_surprise: list[float] = field(repr=False)
    against: dict[str, scoring.Against]
    layers: dict[str, float] = field(repr=False, default_factory=dict)


@dataclass
class Quality:
    """Results on one text: `scored` positions in `windows` windows of `window` tokens.

    note: one line where that is not the usual number.
    """

    model: str
    text: str
    text_sha256: str
    windows: int
    window: int
    scored: int
    variants: list[Variant]
    note: str = ""

    def table(self) -> str:
        """The table, and for a sweep of three sparsities or more a bar chart of KL over sparsity."""
        reference = SOURCE if any(row.name == SOURCE for row in self.variants) else DENSE
        lines = [
            f"{self.text}: {self.scored} positions scored in {self.windows} windows "
            f"of {self.window}, the first half of each a dense prompt",
            f"{'':<12}{'skipped':>8}{'perplexity':>18}{'KL source':>18}{'KL dense':>18}"
            f"{'p99':>8}{'top-1':>8}",
        ]
        for row in self.variants:
            cells = [row.against.get(name) for name in (SOURCE, DENSE)]
            kl_source, kl_dense = (f"{one.kl:.4f} ± {shown(one.se, 4)}" if one else "" for one in cells)
            last = row.against.get(reference)
            tail = f"{last.p99:>8.3f}{last.top1:>8.1%}" if last else ""
            skipped = f"{row.realised:.1%}" if row.sparsity else ""
            ppl = f"{row.perplexity:.2f} ± {shown(row.perplexity_se, 2)}"
            lines.append(f"{row.name:<12}{skipped:>8}{ppl:>18}{kl_source:>18}{kl_dense:>18}{tail}")
        lines.append(
            f"p99 and top-1: against {'the source' if reference == SOURCE else 'dense'}; ± standard errors"
        )
        return "\n".join(lines + _chart(self) + ([self.note] if self.note else []))


@dataclass(frozen=True)
class Difference:
    """How much higher a variant's accuracies are than a reference's on the same questions; paired errors."""

    acc: float
    acc_se: float
    acc_norm: float
    acc_norm_se: float


@dataclass
class Answers:
    """One variant's accuracies, 0 to 1, with standard errors. correct, correct_norm: per question.

    realised: share of Zigzag weights skipped over the rows that were decode steps: all tokens of an ending
    but its last, after which nothing is predicted.
    """

    name: str
    sparsity: float | None
    realised: float
    acc: float
    acc_se: float
    acc_norm: float
    acc_norm_se: float
    against: dict[str, Difference]
    correct: list[bool] = field(repr=False)
    correct_norm: list[bool] = field(repr=False)


@dataclass
class Result:
    """Accuracies on one file of questions."""

    model: str
    file: str
    file_sha256: str
    questions: int
    variants: list[Answers]

    def table(self) -> str:
        """The table, accuracies in percent."""
        width = max(12, *(len(row.name) + 1 for row in self.variants))
        lines = [
            f"{self.file}: {self.questions} questions; contexts run dense, endings as decode steps",
            f"{'':<{width}}{'skipped':>8}{'acc':>16}{'acc_norm':>16}"
            f"{'acc - dense':>18}{'acc_norm - dense':>18}",
        ]
        for row in self.variants:
            skipped = f"{row.realised:.1%}" if row.sparsity else ""
            values = ((row.acc, row.acc_se), (row.acc_norm, row.acc_norm_se))
            cells = "".join(f"{f'{100 * value:.1f} ± {shown(100 * se, 1)}':>16}" for value, se in values)
            other = row.against.get(DENSE)
            if other is not None:
                pairs = ((other.acc, other.acc_se), (other.acc_norm, other.acc_norm_se))
                cells += "".join(f"{f'{100 * value:+.1f} ± {shown(100 * se, 1)}':>18}" for value, se in pairs)
            lines.append(f"{row.name:<{width}}{skipped:>8}{cells}".rstrip())
        lines.append("± standard errors; differences are paired by question")
        return "\n".join(lines)


def shown(value: float, digits: int) -> str:
    """A figure as text; a dash for what doesn't exist, such as the standard error of one window."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _chart(quality: Quality) -> list[str]:
    rows = [row for row in quality.variants if row.sparsity]
    if len(rows) < 3:
        return []
    longest = max(row.against[DENSE].kl for row in rows) or 1.0
    bars = [f"{row.name:>6} {'#' * round(BAR * row.against[DENSE].kl / longest)}" for row in rows]
    return ["KL to dense", *bars]
