"""Pictures of characters, for a terminal and without matplotlib: bars, and a grid of coloured cells.

Numbers stand beside every colour, so that nothing is lost without colours. Rich is imported when one is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 80  # columns, at most as many as the terminal has
LONGEST_BAR = 28  # characters
LEAST, LONGEST_HEAD = 5, 14  # columns of a grid's cell, and of the name above it
NAMES = 5  # columns of the rows' names
BLOCKS = " ▏▎▍▌▋▊▉█"
# Readable on white and on black.
BLUE, ORANGE, GREEN = "#2f7fc1", "#c8641e", "#2a8f6d"
Shades = tuple[str, str]  # of the least and the most


@dataclass(frozen=True)
class Bar:
    """One line: a name, a length (0 or more, in the unit of all bars), and what is said of it."""

    name: str
    value: float
    said: str
    colour: str = BLUE


@dataclass(frozen=True)
class Cell:
    """One cell of a grid. shade: 0 to 1, between the two shades of the grid."""

    said: str
    shade: float


Rows = Mapping[str, Sequence[Cell | None]]


def bars(title: str, found: Sequence[Bar]) -> Any:
    """A renderable of Rich: bars from 0, the longest as long as there is room."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.columns[0].justify = "right"
    most = max([one.value for one in found], default=0.0) or 1.0
    for one in found:
        table.add_row(Text(one.name), Text(_bar(one.value / most), one.colour), Text(one.said))
    return Group(Text(title), table)


def _bar(share: float) -> str:
    """A bar of a share (0 to 1) of LONGEST_BAR characters, in eighths of one."""
    eighths = round(max(0.0, share) * LONGEST_BAR * 8)
    whole, rest = divmod(eighths, 8)
    return BLOCKS[8] * whole + (BLOCKS[rest] if rest else "")


def grid(title: str, columns: Sequence[str], rows: Rows, shades: Shades) -> Any:
    """A renderable of Rich: cells in colours, a line for each row, None where there is nothing.

    Columns for which there is no room come below.
    """
    from rich.console import Group
    from rich.text import Text

    parts = [_part(columns, chosen, rows, shades) for chosen in _fitting(columns)]
    return Group(Text(title), *parts)


def _fitting(columns: Sequence[str]) -> list[list[int]]:
    """The columns' numbers, cut where a line would be longer than WIDTH."""
    found: list[list[int]] = [[]]
    left = WIDTH - NAMES
    for at, name in enumerate(columns):
        width = max(LEAST, len(name[:LONGEST_HEAD])) + 1
        if width > left and found[-1]:
            found.append([])
            left = WIDTH - NAMES
        found[-1].append(at)
        left -= width
    return found


def _part(columns: Sequence[str], chosen: Sequence[int], rows: Rows, shades: Shades) -> Any:
    from rich.table import Table
    from rich.text import Text

    heads = [columns[at][-LONGEST_HEAD:] for at in chosen]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    for head in heads:
        table.add_column(Text(head), justify="center", no_wrap=True)
    for name, cells in rows.items():
        shown = []
        for head, at in zip(heads, chosen, strict=True):
            one = cells[at]
            shown.append(Text("") if one is None else _cell(one, shades, max(LEAST, len(head))))
        table.add_row(Text(name), *shown)
    return table


def _cell(cell: Cell, shades: Shades, width: int) -> Any:
    from rich.text import Text

    share = min(max(cell.shade, 0.0), 1.0)
    low, high = ([int(shade[at : at + 2], 16) for at in (1, 3, 5)] for shade in shades)
    mixed = [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    paper = "#" + "".join(f"{part:02x}" for part in mixed)
    ink = "#ffffff" if sum(mixed) < 330 else "#000000"
    return Text(f"{cell.said:^{width}}", f"{ink} on {paper}")


def print_all(title: str, shown: Sequence[Any], note: str) -> None:
    """Print renderables one below another on stdout, a title above and a note below them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    for part in (Text(title, "bold"), *shown, Text(note)):
        console.print()
        console.print(part)
