"""What calibrate, inspect, bench and compare draw with --plot."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from spqt_cli.errors import SpqtError
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.system.picture import COLOURS, INK, Panel, Picture, tidy

if TYPE_CHECKING:
    from spqt_cli.bench.results import ModelRow, Report
    from spqt_cli.calibrate.result import Calibration
    from spqt_cli.evaluate.compare import Row
    from spqt_cli.format.folder import Folder

HELD_OUT = "Shares of inputs skipped on held-out text, by layer."
CELL = 0.19  # inches of a row of the heat map
HEAT = ("#e3ecf5", "#0b3a66")  # nothing and all skipped; cells keep them on a dark page
BINS = 48  # of a layer's histogram
DARK_FROM = 0.55  # share from which a cell's figure is white


@dataclass(frozen=True)
class Speed:
    """Tokens/s at a sparsity (0: dense), repetition by repetition; profiled: with the device's profile."""

    sparsity: float
    rates: Sequence[float]
    profiled: bool = False

    @property
    def middle(self) -> float:
        """The median."""
        return sorted(self.rates)[len(self.rates) // 2]


def of_calibration(result: "Calibration") -> Picture:
    """The share that each layer skips on held-out text."""
    shares = {row.path: row.realised for row in result.layers}
    quality = f"{result.realised:.1%} skipped, KL to dense {result.tried[0].kl:.3f}"
    return Picture(f"{result.folder.resolve().name}: {quality}", [_heat_map(shares)], HELD_OUT)


def of_folder(folder: "Folder", layer: str | None) -> Picture:
    """The share that each layer skips, and the inputs of one: by default of the one that skips most.

    Raises SpqtError for a folder without a calibration, and for a layer that it has not.
    """
    if folder.calibration is None:
        raise SpqtError(f"{folder} has no thresholds to draw", f"spqt calibrate {folder}")
    rows = folder.calibration.record["layers"]
    shares = {path: rows[path]["realised"] for path in folder.layers}
    chosen = max(shares, key=lambda path: shares[path]) if layer is None else layer
    if chosen not in folder.layers:
        raise SpqtError(f"{folder} has no Zigzag layer {chosen}", f"such as {next(iter(folder.layers))}")
    one = folder.layers[chosen]
    inputs = Panel(
        f"Distribution of the inputs of {chosen} and its threshold",
        functools.partial(_inputs, path=chosen, curve=one.curve, threshold=one.threshold or 0.0),
    )
    title = f"{folder.path.resolve().name}: {folder.calibration.sparsity:.0%} skipped"
    return Picture(title, [_heat_map(shares), inputs], HELD_OUT)


def of_bench(report: "Report") -> Picture:
    """Tokens/s over sparsity, a panel for each decode test; stock is a line across. report: of a model."""
    panels, rows = [], cast("list[ModelRow]", report.rows)
    for test, depth in dict.fromkeys((row.test, row.depth) for row in rows if row.test.startswith("tg")):
        own = [row for row in rows if (row.test, row.depth) == (test, depth)]
        stock = next((row for row in own if row.variant == "stock"), None)
        speeds = [
            Speed(row.sparsity or 0.0, row.rate.samples, row.variant.endswith(", profile"))
            for row in own
            if row is not stock
        ]
        panels.append(_speed_panel(f"{test} at depth {depth}", speeds, stock.rate.samples if stock else ()))
    note = "Points are medians, bars ranges of repetitions."
    return Picture("Tokens per second over sparsity", panels, note)


def of_comparison(rows: "Sequence[Row]") -> Picture:
    """Tokens/s over sparsity, and KL over the bytes that a token reads where it was measured."""
    stock = next((row.speeds.rounds for row in rows if row.stock), ())
    speeds = [Speed(row.sparsity_target, row.speeds.rounds) for row in rows if not row.stock]
    panels = [_speed_panel(f"{rows[0].timed_tokens} tokens by turns", speeds, stock)]
    held = [row for row in rows if row.divergence is not None]
    if held:
        draw, edges = functools.partial(_quality, rows=held), (0.7, 0.6, 0.55, 0.35)
        panels.append(Panel("KL over megabytes per token", draw, edges=edges))
    return Picture("Speed and quality over sparsity", panels, "Points are medians, bars ranges of rounds.")


def _speed_panel(name: str, speeds: Sequence[Speed], stock: Sequence[float]) -> Panel:
    draw = functools.partial(_speed, name=name, speeds=speeds, stock=stock)
    return Panel(f"Tokens per second over sparsity, {name}", draw)


def _speed(axes: Any, name: str, speeds: Sequence[Speed], stock: Sequence[float]) -> None:
    tidy(axes, name, "sparsity, percent", "tokens per second")
    for profiled, colour, mark in ((False, COLOURS[0][0], "o"), (True, COLOURS[2][0], "s")):
        own = sorted((one for one in speeds if one.profiled == profiled), key=lambda one: one.sparsity)
        axes.errorbar(
            [one.sparsity * 100 for one in own], [one.middle for one in own],
            [[one.middle - min(one.rates) for one in own], [max(one.rates) - one.middle for one in own]],
            color=colour, marker=mark, linewidth=1.6, elinewidth=1, capsize=3,
        )  # fmt: skip
        for one in own[-1:] if profiled else ():
            axes.annotate(
                "profile", (one.sparsity * 100, one.middle), (-6, 6),
                textcoords="offset points", ha="right", fontsize=9, color=colour,
            )  # fmt: skip
    axes.set_xticks(sorted({one.sparsity * 100 for one in speeds}))
    if stock:
        middle = Speed(0.0, stock).middle
        axes.axhspan(min(stock), max(stock), color=COLOURS[1][0], alpha=0.15, linewidth=0)
        axes.axhline(middle, color=COLOURS[1][0], linewidth=1.2)
        axes.annotate(
            "stock mlx-lm", (1, middle), (-4, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=9, color=COLOURS[1][0],
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)


def _quality(axes: Any, rows: "Sequence[Row]") -> None:
    found = [(row, row.divergence) for row in rows if row.divergence is not None]
    tidy(axes, found[0][1].text, "MB of weights that a token reads", f"KL to {found[0][1].reference}, nats")
    for kind, colour, mark in ((True, COLOURS[1][0], "^"), (False, COLOURS[0][0], "o")):
        own = [(row, held) for row, held in found if row.stock == kind]
        axes.errorbar(
            [row.statistics.weight_bytes_per_token / 1e6 for row, _ in own],
            [held.mean for _, held in own], [held.se for _, held in own],
            color=colour, marker=mark, linewidth=1.6, elinewidth=1, capsize=3,
        )  # fmt: skip
        for row, held in own:
            place = (row.statistics.weight_bytes_per_token / 1e6, held.mean)
            axes.annotate(row.name, place, (6, 4), textcoords="offset points", fontsize=9, color=colour)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1, y=0.15)


def _heat_map(shares: Mapping[str, float]) -> Panel:
    """Blocks down, projections across; shares: path of a layer -> 0 to 1."""
    blocks: dict[str, dict[str, float]] = {}
    for path, share in shares.items():
        parts = path.split(".")
        number = next((part for part in parts if part.isdigit()), "-")
        blocks.setdefault(number, {})[parts[-1]] = share
    ordered = sorted(blocks, key=lambda number: (number == "-", int(number) if number.isdigit() else 0))
    kinds = list(dict.fromkeys(kind for number in ordered for kind in blocks[number]))
    edges = (0.7, 0.2, 0.2, 0.75)
    return Panel(
        "Heat map of the share that each layer skips",
        functools.partial(_cells, blocks=blocks, ordered=ordered, kinds=kinds),
        height=edges[2] + edges[3] + CELL * len(ordered),
        edges=edges,
    )


def _cells(
    axes: Any, blocks: Mapping[str, Mapping[str, float]], ordered: Sequence[str], kinds: Sequence[str]
) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("skipped", HEAT)
    axes.set_title("percent of inputs skipped, block by projection", loc="left", fontsize=10.5, pad=22)
    for down, number in enumerate(ordered):
        for across, kind in enumerate(kinds):
            if (share := blocks[number].get(kind)) is None:
                continue
            axes.add_patch(Rectangle((across, down), 0.97, 0.94, color=colours(share), linewidth=0))
            ink = "white" if share >= DARK_FROM else "black"
            axes.text(
                across + 0.485, down + 0.5, f"{share:.0%}".rstrip("%"),
                ha="center", va="center", fontsize=7.5, color=ink,
            )  # fmt: skip
    axes.set_xlim(0, len(kinds))
    axes.set_ylim(len(ordered), 0)
    axes.set_xticks([at + 0.485 for at in range(len(kinds))], kinds, fontsize=8)
    axes.set_yticks([at + 0.5 for at in range(len(ordered))], ordered, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_facecolor("none")
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def _inputs(axes: Any, path: str, curve: Sequence[float], threshold: float) -> None:
    """A histogram from the stored quantiles, in bins of one width; the last quantile ends it."""
    import numpy as np

    below = f"magnitude of an input; below {threshold:.3g} (the line) it is skipped"
    tidy(axes, f"inputs of {path}", below, "percent of inputs")
    edges = np.linspace(0, curve[-1], BINS + 1)
    shares = np.diff(np.interp(edges, curve, CURVE_SPARSITIES)) * 100
    colours = [COLOURS[1][0] if edge < threshold else COLOURS[0][0] for edge in edges[:-1]]
    axes.bar(edges[:-1], shares, np.diff(edges) * 0.9, align="edge", color=colours, linewidth=0)
    axes.axvline(threshold, color=INK[0], linewidth=1.2)
    axes.margins(x=0.02)
