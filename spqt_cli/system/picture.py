"""Pictures as PNG, SVG or a page of one file, or in the terminal; what is in them its callers draw.

A page's panels are inline SVG whose colours follow light and dark. Matplotlib is an extra and is imported
only here; a picture in the terminal needs none.
"""

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spqt_cli.errors import ResourceError, UnsupportedError, UsageError
from spqt_cli.system import terminal_picture
from spqt_cli.system.terminal import harmless

KINDS = (".png", ".svg", ".html")
TERMINAL = Path("-")  # the name of a picture in the terminal
WIDTH, HEIGHT = 6.4, 3.5  # inches of a panel
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


@dataclass(frozen=True)
class Panel:
    """One pair of axes. label: says what it shows to who can't see it. draw: gets matplotlib's axes. shown:
    makes the same for a terminal, a renderable of Rich.

    height and edges in inches; edges: left, right, below and above the axes.
    """

    label: str
    draw: Callable[[Any], None]
    shown: Callable[[], Any]
    height: float = HEIGHT
    edges: tuple[float, float, float, float] = (0.7, 0.3, 0.55, 0.35)


@dataclass(frozen=True)
class Picture:
    """Panels one below another. title, note: head of a page; table: plain text under its panels."""

    title: str
    panels: Sequence[Panel]
    note: str = ""
    table: str = ""


def check(path: Path, json_output: bool = False) -> None:
    """Refuse, before any work, a picture that can't be drawn. json_output: stdout is to hold JSON alone."""
    if path == TERMINAL:
        if json_output:
            raise UsageError("--plot - and --json both want stdout", "--plot FILE.png")
        return
    if path.suffix.lower() not in KINDS:
        raise UsageError(
            f"--plot {path} is no picture's name", f"end it in {', '.join(KINDS)}, or '-' for the terminal"
        )
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder", "make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "matplotlib, which --plot FILE draws with, is missing",
            "pip install 'spqt[plot]', or --plot - for the terminal",
        )


def save(picture: Picture, path: Path) -> None:
    """Write a picture in the form that its name's ending says; ResourceError where it can't be written."""
    if path == TERMINAL:
        shown = [panel.shown() for panel in picture.panels]
        terminal_picture.print_all(harmless(picture.title), shown, harmless(picture.note))
        return
    kind = path.suffix.lower()
    data = _page(picture).encode() if kind == ".html" else drawn(picture.panels, kind[1:])
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ResourceError(f"{path} can't be written: {error.strerror}", "choose another place") from None


def tidy(axes: Any, title: str, x: str, y: str) -> None:
    """Title and names of axes; a faint grid behind what is drawn."""
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_facecolor(PAPER[0])
    axes.grid(color=FAINT[0], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def drawn(panels: Sequence[Panel], kind: str) -> bytes:
    """The panels one below another; kind: png or svg."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": panels[0].label,
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK[0]),
        "axes.edgecolor": FAINT[0],
    }
    with matplotlib.rc_context(style):
        total = sum(panel.height for panel in panels)
        figure = Figure(figsize=(WIDTH, total), facecolor=PAPER[0])
        floor = total
        for panel in panels:
            left, right, bottom, top = panel.edges
            floor -= panel.height
            wide, high = WIDTH - left - right, panel.height - bottom - top
            panel.draw(figure.add_axes((left / WIDTH, (floor + bottom) / total, wide / WIDTH, high / total)))
        found = io.BytesIO()
        figure.savefig(found, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return found.getvalue()


def _page(picture: Picture) -> str:
    """The panels as inline SVG, each as wide as a phone at least, and the table below."""
    panels = "\n".join(f"<figure>{_inline(one)}</figure>" for one in picture.panels)
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
        "h1 { font-size: clamp(1.2rem, 5vw, 2rem); overflow-wrap: anywhere }\n"
        "figure { margin: 0 } svg { width: 100%; height: auto } pre { overflow-x: auto; font-size: 13px;"
        " border-top: 1px solid var(--faint); padding-top: 1rem }"
    )
    title = html.escape(harmless(picture.title))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}\n</style></head>\n<body>\n"
        f"<h1>{title}</h1>\n<p>{html.escape(harmless(picture.note))}</p>\n<main>\n{panels}\n</main>\n"
        f"<pre>{html.escape(harmless(picture.table))}</pre>\n</body></html>\n"
    )


def _inline(panel: Panel) -> str:
    """One panel's SVG for a page: colours as variables, nothing but what is drawn."""
    text = drawn([panel], "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # of groups, to which nothing refers
    pairs = [("ink", INK), ("faint", FAINT), ("paper", PAPER)]
    for name, (light, _) in [*pairs, *((f"c{at}", pair) for at, pair in enumerate(COLOURS))]:
        text = text.replace(light, f"var(--{name})")
    label = html.escape(panel.label, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
