"""What an evaluation found: the result, its table and its picture for people."""

import math
from dataclasses import dataclass, field

from spqt_cli.measure import scoring

SOURCE, DENSE, ROWS = "source", "dense", "row-grouped"  # names of variants; the others are shares
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

    note: one line for people where that is not the usual number.
    """

    model: str
    text: str
    text_sha256: str
    windows: int
    window: int
    scored: int
    variants: list[Variant]
    note: str = ""


def report(quality: Quality) -> str:
    """The table, and for a sweep of three shares or more a picture of KL over sparsity."""
    reference = SOURCE if any(row.name == SOURCE for row in quality.variants) else DENSE
    lines = [
        f"{quality.text}: {quality.scored} positions scored in {quality.windows} windows "
        f"of {quality.window}, the first half of each a dense prompt",
        f"{'':<12}{'skipped':>8}{'perplexity':>18}{'KL source':>18}{'KL dense':>18}{'p99':>8}{'top-1':>8}",
    ]
    for row in quality.variants:
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
    return "\n".join(lines + _picture(quality) + ([quality.note] if quality.note else []))


def shown(value: float, digits: int) -> str:
    """A figure for people; a dash for what doesn't exist, such as the standard error of one window."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _picture(quality: Quality) -> list[str]:
    rows = [row for row in quality.variants if row.sparsity]
    if len(rows) < 3:
        return []
    longest = max(row.against[DENSE].kl for row in rows) or 1.0
    bars = [f"{row.name:>6} {'#' * round(BAR * row.against[DENSE].kl / longest)}" for row in rows]
    return ["KL to dense", *bars]
