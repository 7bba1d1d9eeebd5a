"""What a dry run prints, in 80 columns: tensors that are stored alike in one line of a table."""

import re
import textwrap
from collections.abc import Sequence

Kept = tuple[str, str, int, int, int]  # name, kind, bits, group size, bytes
WIDTH = 42  # of names; longer ones lose their middle
COLUMNS = 80


def lines(rows: Sequence[Kept]) -> list[str]:
    """A head, then a line for each group of tensors whose names differ in numbers alone, in their order.

    Sizes in MB, of a group together; bits and group size 0 where nothing is quantized.
    """
    groups: dict[tuple[str, str, int, int], list[int]] = {}
    for name, kind, bits, group_size, size in rows:
        alike = re.sub(r"\.\d+(?=\.|$)", ".*", name).removesuffix(".weight")
        groups.setdefault((alike, kind, bits, group_size), []).append(size)
    head = f"{'tensor':<{WIDTH}}{'count':>6}  {'stored':<11}{'bits':>5}{'group':>6}{'MB':>8}"
    return [head, *(_line(*key, sizes) for key, sizes in groups.items())]


def wrapped(lines: Sequence[str]) -> list[str]:
    """Lines of at most COLUMNS; what is left of one goes on indented."""
    found: list[str] = []
    for line in lines:
        deeper = " " * (len(line) - len(line.lstrip()) + 4)
        found += textwrap.wrap(line, COLUMNS, subsequent_indent=deeper, break_on_hyphens=False) or [""]
    return found


def _line(name: str, kind: str, bits: int, group_size: int, sizes: Sequence[int]) -> str:
    shown = name if len(name) <= WIDTH else f"{name[:14]}...{name[-(WIDTH - 17) :]}"
    settings = f"{bits or '-':>5}{group_size or '-':>6}"
    return f"{shown:<{WIDTH}}{len(sizes):>6}  {kind:<11}{settings}{sum(sizes) / 1e6:>8.1f}"
