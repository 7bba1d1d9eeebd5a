"""What calibrate, inspect, bench and compare draw with --plot."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from spqt_cli.cli import heat_maps
from spqt_cli.errors import SpqtError
from spqt_cli.format.thresholds import QUANTILES
from spqt_cli.system import terminal_picture
from spqt_cli.system.picture import COLOURS, INK, Panel, Picture, tidy
from spqt_cli.system.terminal import harmless
from spqt_cli.system.terminal_picture import BLUE, ORANGE, Bar

if TYPE_CHECKING:
    from spqt_cli.bench.results import ModelRow, Report
    from spqt_cli.calibrate.result import Calibration
    from spqt_cli.evaluate.compare import Row
    from spqt_cli.format.folder import Folder

HELD_OUT = "Shares of inputs skipped on held-out text, by layer."
PRICES = f"{HELD_OUT} Prices are estimates from gradients; their sum is of the size of the KL."
UNPRICED = f"{HELD_OUT} No prices: only methods with gradients (auto, fast) know them."
BINS = 48  # of a layer's histogram
TERMINAL_BINS = 16  # likewise, in the terminal
OF_INPUTS = "dense, on the calibration's text, all but the largest 2%"
MOST_RECORDED = 1e6  # nats, or a share: whatever lies above was not written by a calibration


@dataclass(frozen=True)
class Speed:
    """Tokens/s at a sparsity (0: dense), repetition by repetition; profiled: with the device's profile."""

    sparsity: float
    rates: Sequence[float]
    profiled: bool = False

    @property
    def middle(self) -> float:
        """The median."""
        return statistics.median(self.rates)


def of_calibration(result: "Calibration") -> Picture:
    """The share that each layer skips on held-out text, and its price."""
    shares = {row.path: row.realised for row in result.layers}
    prices = {row.path: row.price for row in result.layers if row.price is not None}
    quality = f"{result.realised:.1%} skipped, KL to dense {result.tried[0].kl:.3f}"
    return _by_layer(f"{result.folder.resolve().name}: {quality}", shares, prices)


def of_folder(folder: "Folder", layer: str | None) -> Picture:
    """The share that each layer skips, its price, and the inputs of one: by default of the one that skips
    most.

    Raises SpqtError for a folder without a calibration, and for a layer that it has not.
    """
    if folder.calibration is None:
        raise SpqtError(f"{folder} has no thresholds to draw", f"spqt calibrate {folder}")
    shares, prices = _recorded(folder, "realised"), _recorded(folder, "price")
    if shares.keys() != folder.layers.keys():
        raise SpqtError(f"{folder} does not say what each layer skips", f"spqt calibrate {folder}")
    chosen = max(shares, key=lambda path: shares[path]) if layer is None else layer
    if chosen not in folder.layers:
        raise SpqtError(f"{folder} has no Zigzag layer {chosen}", f"such as {next(iter(folder.layers))}")
    title = f"{folder.path.resolve().name}: {folder.calibration.sparsity:.0%} skipped"
    found, quantiles = _by_layer(title, shares, prices), _quantiles(folder, chosen)
    threshold = folder.layers[chosen].threshold or 0.0
    if quantiles is None:  # calibrated before they were recorded, or never reached by the text
        if layer is None:
            return found
        raise SpqtError(f"{folder} does not say what enters {chosen}", f"spqt calibrate {folder}")
    inputs = Panel(
        f"Distribution of the inputs of {chosen} and its threshold",
        functools.partial(_inputs, path=chosen, quantiles=quantiles, threshold=threshold),
        functools.partial(_inputs_shown, chosen, quantiles, threshold),
    )
    return dataclasses.replace(found, panels=[*found.panels, inputs])


def _by_layer(title: str, shares: Mapping[str, float], prices: Mapping[str, float]) -> Picture:
    """Heat maps of what layers skip and of what it costs. Both: path of a layer -> a number."""
    panels = [heat_maps.of_shares(shares), *([heat_maps.of_prices(prices)] if prices else [])]
    return Picture(title, panels, PRICES if prices else UNPRICED)


def _recorded(folder: "Folder", key: str) -> dict[str, float]:
    """Path of each layer -> a number that its calibration recorded, where it did."""
    listed = folder.calibration.record.get("layers") if folder.calibration else None
    rows, found = listed if isinstance(listed, dict) else {}, {}
    for path in folder.layers:
        row = rows.get(path)
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, (int, float)) and 0 <= value <= MOST_RECORDED:
            found[path] = float(value)
    return found


def _quantiles(folder: "Folder", path: str) -> list[float] | None:
    """Of a layer's |x|, at QUANTILES; None where its calibration recorded none, or what can be none."""
    recorded = folder.calibration.record.get("quantiles") if folder.calibration else None
    values = recorded.get(path) if isinstance(recorded, dict) else None
    if not isinstance(values, list) or len(values) != len(QUANTILES):
        return None
    if not all(isinstance(one, (int, float)) and 0 <= one <= MOST_RECORDED for one in values):
        return None
    rising = all(low <= high for low, high in itertools.pairwise(values))
    return [float(one) for one in values] if rising and values[-1] > 0 else None


def of_bench(report: "Report") -> Picture:
    """Tokens/s over sparsity, a panel for each decode test; stock is a line across. report: of a model."""
    from spqt_cli.bench import results

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
    named = report.settings.get("model") or report.settings.get("shape")
    machine = report.machine
    note = (
        f"Points are medians, bars ranges of repetitions. {machine.get('device')}, backend "
        f"{machine.get('backend')}, MLX {machine.get('mlx')}."
    )
    return Picture(f"{named}: tokens per second over sparsity", panels, note, results.render(report, "md"))


def of_comparison(model: str, rows: "Sequence[Row]") -> Picture:
    """Tokens/s over sparsity, and KL over the bytes that a token reads where it was measured.

    model: its name, as it was given.
    """
    from spqt_cli.evaluate import compare_report

    stock = next((row.speeds.rounds for row in rows if row.stock), ())
    speeds = [Speed(row.sparsity_target, row.speeds.rounds) for row in rows if not row.stock]
    panels = [_speed_panel(f"{rows[0].timed_tokens} tokens by turns", speeds, stock)]
    held = [row for row in rows if row.divergence is not None]
    if held:
        draw, shown = functools.partial(_quality, rows=held), functools.partial(_quality_shown, held)
        panels.append(Panel("KL over megabytes per token", draw, shown, edges=(0.7, 0.6, 0.55, 0.35)))
    note = "Of speeds points are medians, bars ranges of rounds; of KL bars are standard errors."
    title = f"{model}: speed and quality over sparsity"
    return Picture(title, panels, f"{compare_report.verdict(rows)} {note}", compare_report.report(rows))


def _speed_panel(name: str, speeds: Sequence[Speed], stock: Sequence[float]) -> Panel:
    draw = functools.partial(_speed, name=name, speeds=speeds, stock=stock)
    shown = functools.partial(_speed_shown, name, speeds, stock)
    return Panel(f"Tokens per second over sparsity, {name}", draw, shown)


def _speed_shown(name: str, speeds: Sequence[Speed], stock: Sequence[float]) -> Any:
    ordered = sorted(speeds, key=lambda one: (one.profiled, one.sparsity))
    named = [Bar("stock mlx-lm", *_said(stock), ORANGE)] if stock else []
    for one in ordered:
        called = f"{one.sparsity:.0%} skipped" if one.sparsity else "dense"
        named.append(Bar(f"{called}, profile" if one.profiled else called, *_said(one.rates)))
    return terminal_picture.bars(f"{name}, tokens per second", named)


def _said(rates: Sequence[float]) -> tuple[float, str]:
    """The median, and it with the range in words."""
    middle = Speed(0.0, rates).middle
    return middle, f"{middle:.1f} ({min(rates):.1f} to {max(rates):.1f})"


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
            at, side = ((-6, 4), "right") if row.stock else ((6, 4), "left")
            axes.annotate(row.name, place, at, textcoords="offset points", ha=side, fontsize=9, color=colour)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1, y=0.15)


def _quality_shown(rows: "Sequence[Row]") -> Any:
    found = [(row, row.divergence) for row in rows if row.divergence is not None]
    named = [
        Bar(
            row.name,
            held.mean,
            f"{held.mean:.3f} at {row.statistics.weight_bytes_per_token / 1e6:.1f} MB/token",
            ORANGE if row.stock else BLUE,
        )
        for row, held in found
    ]
    return terminal_picture.bars(f"{found[0][1].text}: KL to {found[0][1].reference}, nats", named)


def _inputs_shown(path: str, quantiles: Sequence[float], threshold: float) -> Any:
    edges, shares = _binned(quantiles, threshold, TERMINAL_BINS)
    named = [
        Bar(f"{low:.3g} to {high:.3g}", share, f"{share:.1f}%", ORANGE if high <= threshold else BLUE)
        for (low, high), share in zip(itertools.pairwise(edges), shares, strict=True)
    ]
    title = f"inputs of {harmless(path)}, {OF_INPUTS}; below {threshold:.3g} (orange) they are skipped"
    return terminal_picture.bars(title, named)


def _binned(quantiles: Sequence[float], threshold: float, bins: int) -> tuple[list[float], list[float]]:
    """Edges of bins up to the last quantile, one of them the threshold, and the percent of inputs in each."""
    import numpy as np

    cut = min(threshold, quantiles[-1])
    skipped = min(max(round(bins * cut / quantiles[-1]), cut > 0), bins - (cut < quantiles[-1]))
    edges = np.append(
        np.linspace(0, cut, skipped + 1)[:-1], np.linspace(cut, quantiles[-1], bins - skipped + 1)
    )
    below = np.interp(edges, quantiles, QUANTILES)
    below[0] = 0.0  # zeros are in the first bin
    return edges.tolist(), (np.diff(below) * 100).tolist()


def _inputs(axes: Any, path: str, quantiles: Sequence[float], threshold: float) -> None:
    """A histogram from the stored quantiles; the last quantile ends it."""
    below = f"magnitude of an input, {OF_INPUTS}; below {threshold:.3g} (the line) it is skipped"
    tidy(axes, f"inputs of {path}", below, "percent of inputs")
    edges, shares = _binned(quantiles, threshold, BINS)
    colours = [COLOURS[1][0] if high <= threshold else COLOURS[0][0] for high in edges[1:]]
    widths = [0.9 * (high - low) for low, high in itertools.pairwise(edges)]
    axes.bar(edges[:-1], shares, widths, align="edge", color=colours, linewidth=0)
    axes.axvline(threshold, color=INK[0], linewidth=1.2)
    axes.margins(x=0.02)
