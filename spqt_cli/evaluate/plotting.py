"""Draws KL to the source over the bytes that a token reads: one panel per text, as PNG, SVG or HTML.

A converted model is a line over its sparsities; what runs dense alone is a mark. Matplotlib is an extra and
is imported only here. A page is one file: its panels are inline SVG whose colours follow light and dark.
"""

import html
import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spqt_cli.errors import ResourceError, UnsupportedError, UsageError
from spqt_cli.evaluate.report import SOURCE
from spqt_cli.evaluate.several_report import Compared, Several, TextResult

KINDS = (".png", ".svg", ".html")
WIDTH, HEIGHT = 6.4, 3.5  # inches of a panel
EDGES = 0.7, 1.5, 0.55, 0.35  # inches left, right, below and above the axes; names stand at the right
LONGEST_LABEL = 18  # characters
LABEL_POINTS = 12  # between two labels, at least
LOG_FROM = 3.0  # highest over lowest KL from which the axis is logarithmic
TICKS = [base * scale for scale in (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0) for base in (1, 1.5, 2, 3, 4, 5, 7)]
# Light, and what stands for it on a dark page.
INK, FAINT, PAPER = ("#1b1b1d", "#ececee"), ("#c9c9cd", "#46464c"), ("#fffffe", "#141416")
COLOURS = (
    ("#005fa9", "#62b4ff"),
    ("#b54a00", "#ff9d54"),
    ("#00745a", "#46d3a8"),
    ("#8b2d86", "#e694df"),
    ("#6a6200", "#d9cf4a"),
    ("#a3123f", "#ff86a4"),
)
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


def check(path: Path, baseline: str | None) -> None:
    """Refuse, before any work, a picture that can't be drawn."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"--plot {path} is no picture's name", f"end it in {', '.join(KINDS)}")
    if baseline is None:
        raise UsageError("--plot draws the KL to the source", "name it: --baseline SOURCE")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder", "make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("matplotlib, which --plot draws with, is missing", "pip install 'spqt[plot]'")


def draw(result: Several, path: Path) -> None:
    """Write the picture of an evaluation with a source. Raises ResourceError where it can't be written."""
    kind = path.suffix.lower()
    data = _page(result).encode() if kind == ".html" else _drawn(result.texts, kind[1:])
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ResourceError(f"{path} can't be written: {error.strerror}", "choose another place") from None


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


def _drawn(results: Sequence[TextResult], kind: str) -> bytes:
    """The panels of these texts one below another."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": results[0].text,
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK[0]),
        "axes.edgecolor": FAINT[0],
    }
    with matplotlib.rc_context(style):
        total = HEIGHT * len(results)
        figure = Figure(figsize=(WIDTH, total), facecolor=PAPER[0])
        left, right, bottom, top = EDGES
        for above, result in enumerate(results):
            floor = (len(results) - 1 - above) * HEIGHT + bottom
            wide, high = WIDTH - left - right, HEIGHT - bottom - top
            place = (left / WIDTH, floor / total, wide / WIDTH, high / total)
            _panel(figure.add_axes(place), result)
        found = io.BytesIO()
        figure.savefig(found, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return found.getvalue()


def _panel(axes: Any, result: TextResult) -> None:
    every = series(result)
    for one in every:
        errors = [row.against[SOURCE].se for row in one.rows]
        axes.errorbar(
            one.sizes, one.costs, errors,
            color=one.colour, marker=one.mark, markersize=6, linewidth=1.6, elinewidth=1, capsize=2,
        )  # fmt: skip
    _scales(axes, [cost for one in every for cost in one.costs])
    axes.set_title(f"{result.text}, {result.windows} windows", loc="left", fontsize=10.5)
    axes.set_xlabel("MB of weights that a token reads")
    axes.set_ylabel("KL to the source, nats")
    axes.set_facecolor(PAPER[0])
    axes.grid(color=FAINT[0], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label_shares(axes, every)
    _label_series(axes, every)


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


def _page(result: Several) -> str:
    """The panels as inline SVG, each as wide as a phone at least, and the tables below."""
    panels = "\n".join(f"<figure>{_inline(one)}</figure>" for one in result.texts)
    pairs = {"ink": INK, "faint": FAINT, "paper": PAPER}
    pairs |= {f"c{at}": pair for at, pair in enumerate(COLOURS)}
    light, dark = ("; ".join(f"--{name}: {pair[which]}" for name, pair in pairs.items()) for which in (0, 1))
    style = (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        "body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--paper);"
        " color: var(--ink); font: 16px/1.5 system-ui, sans-serif }\n"
        "main { display: grid; gap: 1rem;"
        " grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }\n"
        "figure { margin: 0 } svg { width: 100%; height: auto } pre { overflow-x: auto; font-size: 13px }"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>KL to the source over bytes per token</title>\n<style>\n{style}\n</style></head>\n<body>\n"
        "<h1>KL to the source over bytes per token</h1>\n<p>Nearer to the lower left is better. Bars are "
        f"standard errors over windows.</p>\n<main>\n{panels}\n</main>\n"
        f"<pre>{html.escape(result.table())}</pre>\n</body></html>\n"
    )


def _inline(result: TextResult) -> str:
    """One panel's SVG for a page: colours as variables, nothing but what is drawn."""
    text = _drawn([result], "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # of groups, to which nothing refers
    pairs = [("ink", INK), ("faint", FAINT), ("paper", PAPER)]
    for name, (light, _) in [*pairs, *((f"c{at}", pair) for at, pair in enumerate(COLOURS))]:
        text = text.replace(light, f"var(--{name})")
    label = html.escape(f"KL to the source over megabytes per token on {result.text}", quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
