"""Heat maps of a model's layers, blocks down and projections across: what each skips, and what that costs."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spqt_cli.system import terminal_picture
from spqt_cli.system.picture import Panel
from spqt_cli.system.terminal import harmless
from spqt_cli.system.terminal_picture import Cell, Shades

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in this order
ROW = 0.19  # inches
LARGEST, USUALLY = 9.0, 8  # points of a figure in a cell, where there are so many columns at most
EDGES = (0.35, 0.1, 0.2, 0.75)  # inches left, right, below and above the cells
# Of nothing and of the most; cells keep them on a dark page.
SKIPPED: Shades = ("#e3ecf5", "#0b3a66")
PRICED: Shades = ("#f8e9dd", "#7c2d00")
DARK_FROM = 0.55  # shade from which a cell's figure is white


@dataclass(frozen=True)
class HeatMap:
    """title: above the cells. blocks: number -> projection -> cell. kinds: the projections, in order."""

    title: str
    blocks: Mapping[str, Mapping[str, Cell]]
    kinds: Sequence[str]
    shades: Shades


def of_shares(shares: Mapping[str, float]) -> Panel:
    """The share that each layer skips. shares: path of a layer -> 0 to 1."""
    cells = {path: Cell(f"{share:.0%}".rstrip("%"), share) for path, share in shares.items()}
    title = "percent of inputs skipped, block by projection"
    return _panel("Heat map of the share that each layer skips", title, cells, SKIPPED)


def of_prices(prices: Mapping[str, float]) -> Panel:
    """What skipping costs in each layer. prices: path -> nats of KL that the layer alone would cause."""
    most = max(prices.values()) or 1.0
    unit, words = (1e3, "thousandths") if most >= 1e-3 else (1e6, "millionths")
    cells = {
        path: Cell(f"{price * unit:.{0 if price * unit >= 9.95 else 1}f}", max(price / most, 0.0) ** 0.5)
        for path, price in prices.items()
    }
    title = f"its price: KL to dense by this layer alone, {words} of a nat"
    return _panel("Heat map of what skipping costs in each layer", title, cells, PRICED)


def _panel(label: str, title: str, cells: Mapping[str, Cell], shades: Shades) -> Panel:
    blocks: dict[str, dict[str, Cell]] = {}
    for path, cell in cells.items():
        parts = path.split(".")
        number = next((part for part in parts if part.isdigit()), "-")
        blocks.setdefault(number, {})[parts[-1]] = cell
    ordered = sorted(blocks, key=lambda number: (number == "-", int(number) if number.isdigit() else 0))
    met = list(dict.fromkeys(kind for number in ordered for kind in blocks[number]))
    kinds = [*(kind for kind in USUAL if kind in met), *(kind for kind in met if kind not in USUAL)]
    made = HeatMap(title, {number: blocks[number] for number in ordered}, kinds, shades)
    return Panel(
        label,
        functools.partial(_draw, made=made),
        functools.partial(_shown, made),
        height=EDGES[2] + EDGES[3] + ROW * len(ordered),
        edges=EDGES,
    )


def _shown(made: HeatMap) -> Any:
    rows = {number: [cells.get(kind) for kind in made.kinds] for number, cells in made.blocks.items()}
    names = [harmless(kind).removesuffix("_proj") for kind in made.kinds]
    return terminal_picture.grid(made.title, names, rows, made.shades)


def _draw(axes: Any, made: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("cells", made.shades)
    size = min(LARGEST, LARGEST * USUALLY / len(made.kinds))
    axes.set_title(made.title, loc="left", fontsize=10.5, pad=22)
    for down, cells in enumerate(made.blocks.values()):
        for across, kind in enumerate(made.kinds):
            if (cell := cells.get(kind)) is None:
                continue
            axes.add_patch(Rectangle((across, down), 0.97, 0.94, color=colours(cell.shade), linewidth=0))
            axes.text(
                across + 0.485, down + 0.5, cell.said, ha="center", va="center", fontsize=size,
                color="white" if cell.shade >= DARK_FROM else "black",
            )  # fmt: skip
    axes.set_xlim(0, len(made.kinds))
    axes.set_ylim(len(made.blocks), 0)
    axes.set_xticks([at + 0.485 for at in range(len(made.kinds))], made.kinds, fontsize=size)
    axes.set_yticks([at + 0.5 for at in range(len(made.blocks))], made.blocks, fontsize=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_facecolor("none")
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
