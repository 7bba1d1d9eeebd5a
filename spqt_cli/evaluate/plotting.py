"""Draws KL to the source over the bytes that a token reads: one panel per text.

A converted model is a line over its sparsities; what runs dense alone is a mark.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spqt_cli.errors import UsageError
from spqt_cli.evaluate.report import SOURCE
from spqt_cli.evaluate.several_report import Compared, Several, TextResult
from spqt_cli.system import picture, terminal_picture
from spqt_cli.system.picture import COLOURS
from spqt_cli.system.terminal import harmless
from spqt_cli.system.terminal_picture import BLUE, GREEN, ORANGE, Bar

EDGES = 0.7, 1.5, 0.55, 0.35  # inches left, right, below and above the axes; names stand at the right
LONGEST_LABEL = 18  # characters
LABEL_POINTS = 12  # between two labels, at least
LOG_FROM = 3.0  # highest over lowest KL from which the axis is logarithmic
TICKS = [base * scale for scale in (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0) for base in (1, 1.5, 2, 3, 4, 5, 7)]
TERMINAL_COLOURS = (BLUE, ORANGE, GREEN)
MARKS = ("o", "^", "v", "s", "D", "P", "X", "<", ">", "p")


@dataclass(frozen=True)
class Series:
    """One model's variants from dense to sparse, or a single dense one."""

    label: str
    rows: list[Compared]
    colour: str
    mark: str

    @property
    def sizes(self) -> list[float]:
        """MB a token reads."""
        return [row.bytes_per_token / 1e6 for row in self.rows]

    @property
    def costs(self) -> list[float]:
        """KL to the source, nats."""
        return [row.against[SOURCE].kl for row in self.rows]


def check(path: Path, baseline: str | None, json_output: bool = False) -> None:
    """Refuse, before any work, a picture that can't be drawn."""
    picture.check(path, json_output)
    if baseline is None:
        raise UsageError("--plot draws the KL to the source", "name it: --baseline SOURCE")


def draw(result: Several, path: Path) -> None:
    """Write the picture of an evaluation with a source. Raises ResourceError where it can't be written."""
    panels = [
        picture.Panel(
            f"KL to the source over megabytes per token on {one.text}",
            functools.partial(_panel, result=one),
            functools.partial(_shown, one),
            edges=EDGES,
        )
        for one in result.texts
    ]
    title = "KL to the source over bytes per token"
    note = "Nearer to the lower left is better. Bars are standard errors over windows."
    picture.save(picture.Picture(title, panels, note, result.table()), path)


def series(result: TextResult) -> list[Series]:
    """What a panel shows, in the order of the table; the source is where KL is 0, and is left out."""
    grouped: dict[str, list[Compared]] = {}
    for row in result.variants:
        if row.name != SOURCE:
            grouped.setdefault(row.model, []).append(row)
    found = []
    for at, (label, rows) in enumerate(grouped.items()):
        colour = COLOURS[at % len(COLOURS)][0]
        shown = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
        rows.sort(key=lambda row: -row.bytes_per_token)
        found.append(Series(shown, rows, colour, MARKS[at % len(MARKS)]))
    return found


def _panel(axes: Any, result: TextResult) -> None:
    every = series(result)
    for one in every:
        errors = [row.against[SOURCE].se for row in one.rows]
        axes.errorbar(
            one.sizes, one.costs, errors,
            color=one.colour, marker=one.mark, markersize=6, linewidth=1.6, elinewidth=1, capsize=2,
        )  # fmt: skip
    _scales(axes, [cost for one in every for cost in one.costs])
    title = f"{result.text}, {result.windows} windows"
    picture.tidy(axes, title, "MB of weights that a token reads", "KL to the source, nats")
    _label_shares(axes, every)
    _label_series(axes, every)


def _shown(result: TextResult) -> Any:
    """The same in the terminal: a bar for each row of each series."""
    named = []
    for at, one in enumerate(series(result)):
        for row, size, cost in zip(one.rows, one.sizes, one.costs, strict=True):
            share = f" {row.sparsity:.0%}" if row.sparsity else ""
            said, colour = f"{cost:.3f} at {size:.1f} MB/token", TERMINAL_COLOURS[at % len(TERMINAL_COLOURS)]
            named.append(Bar(harmless(one.label) + share, cost, said, colour))
    return terminal_picture.bars(f"{harmless(result.text)}: KL to the source, nats", named)


def _scales(axes: Any, costs: Sequence[float]) -> None:
    """A logarithmic axis of KL where it spans much; room at the edges."""
    lowest, highest = min(costs), max(costs)
    axes.margins(x=0.13, y=0.14)
    if lowest > 0 and highest / lowest > LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.35, highest * 1.2)
        axes.set_yticks([tick for tick in TICKS if lowest / 1.35 <= tick <= highest * 1.2])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)


def _label_shares(axes: Any, every: Sequence[Series]) -> None:
    """Left below the lowest line, what share each of its marks was to skip."""
    lines = [one for one in every if len(one.rows) > 1]
    if lines:
        lowest = min(lines, key=lambda one: one.costs[0])
        for row, size, cost in zip(lowest.rows, lowest.sizes, lowest.costs, strict=True):
            if row.sparsity:
                axes.annotate(
                    f"{row.sparsity:.0%}", (size, cost), (-4, -13),
                    textcoords="offset points", ha="right", fontsize=9, color=lowest.colour,
                )  # fmt: skip


def _label_series(axes: Any, every: Sequence[Series]) -> None:
    """Each series' name right of the panel, at the height of its dense mark, pushed apart where they meet."""
    axes.get_xlim(), axes.get_ylim()  # settles them, and so where data lie
    points = 72 / axes.figure.dpi
    ordered = sorted(every, key=lambda one: one.costs[0])
    heights: list[float] = []
    for one in ordered:
        wanted = axes.transData.transform((one.sizes[0], one.costs[0]))[1] * points
        heights.append(max([wanted, *(height + LABEL_POINTS for height in heights[-1:])]))
    for one, height in zip(ordered, heights, strict=True):
        axes.annotate(
            one.label, (one.sizes[0], one.costs[0]), (axes.bbox.x1 * points + 8, height),
            textcoords="figure points", va="center", fontsize=9.5, color=one.colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": one.colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 5},
        )  # fmt: skip
