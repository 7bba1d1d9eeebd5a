"""Results of a benchmark and their four forms: markdown, CSV, JSON, JSON lines.

It measures nothing. Every figure comes from several samples; the samples themselves are in the JSON.
"""

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from spqt_cli.bench.quiet_host import Quiet
from spqt_cli.errors import UsageError

FORMATS = ("md", "csv", "json", "jsonl")
QUIET_COLUMN = "quiet host"


@dataclass
class Stat:
    """Repeated measurements of one quantity, at least two."""

    samples: list[float]

    def __post_init__(self) -> None:
        if len(self.samples) < 2:
            raise UsageError("one sample says nothing about its spread", "use --repetitions 2 or more")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """The standard deviation of the samples."""
        return statistics.stdev(self.samples)

    def plain(self) -> dict[str, Any]:
        return {
            "mean": self.mean, "median": self.median, "spread": self.spread,
            "min": min(self.samples), "max": max(self.samples), "samples": self.samples,
        }  # fmt: skip


def ratio(ours: Stat, stock: Stat, *, of_times: bool) -> Stat:
    """How many times faster `ours` is, repetition by repetition: drift of the machine cancels.

    of_times: the samples are durations, not rates.
    """
    pairs = zip(ours.samples, stock.samples, strict=True)
    return Stat([b / a if of_times else a / b for a, b in pairs])


@dataclass
class ModelRow:
    """One test of one variant of a model.

    rate: tokens per second. sparsity: wanted; skipped: fraction of Zigzag weights really skipped.
    weight_bytes: read per token; bandwidth: those bytes per second at the median rate.
    memory_bytes: weights and the most that the run took in addition. joules: per token.
    host_us: a fixed Python loop, before and after each sample; quiet_host: what the run makes of it.
    """

    test: str
    depth: int
    variant: str
    sparsity: float | None
    skipped: float | None
    rate: Stat
    speedup: Stat
    weight_bytes: float | None
    bandwidth: float | None
    copy_share: float | None
    memory_bytes: float
    joules: float | None
    host_us: list[tuple[float, float]]
    quiet_host: Quiet | None = None  # known when the run is over

    def cells(self) -> dict[str, str]:
        return {
            "test": self.test + (f" @ d{self.depth}" if self.depth else ""),
            "variant": self.variant,
            "skipped": _percent(self.skipped),
            "tok/s": f"{self.rate.mean:.2f} ± {self.rate.spread:.2f}",
            "x stock (median, range)": _speedup(self.speedup),
            QUIET_COLUMN: self.quiet_host.text() if self.quiet_host is not None else "",
            "MB/token": _number(self.weight_bytes, 1e6, 1),
            "GB/s": _number(self.bandwidth, 1e9, 1),
            "of copy": _percent(self.copy_share),
            "memory GB": f"{self.memory_bytes / 1e9:.2f}",
            "J/token": _number(self.joules, 1, 3),
        }


@dataclass
class KernelRow:
    """One variant of one projection, or of several that share an input.

    time: microseconds per call, dispatch included; host: of them building the graph in Python.
    weight_bytes: of the active channels; line_bytes: in whole memory lines, None where not worked out.
    """

    unit: str
    shape: str
    variant: str
    sparsity: float | None
    time: Stat
    host: Stat
    speedup: Stat
    weight_bytes: float
    line_bytes: float | None
    bandwidth: float
    copy_share: float

    def cells(self) -> dict[str, str]:
        return {
            "unit": self.unit,
            "outputs x inputs": self.shape,
            "variant": self.variant,
            "us": f"{self.time.mean:.1f} ± {self.time.spread:.1f}",
            "x stock (median, range)": _speedup(self.speedup),
            "host us": f"{self.host.median:.1f}",
            "MB": f"{self.weight_bytes / 1e6:.3f}",
            "MB in lines": _number(self.line_bytes, 1e6, 3),
            "GB/s": f"{self.bandwidth / 1e9:.1f}",
            "of copy": _percent(self.copy_share),
        }


@dataclass
class Crossover:
    """Where sparse stops paying for one unit: `sparse_below` is a density, 0 never to 1 always.

    otherwise: the dense way that is fastest there, `zigzag` or `row-grouped`. key: for the profile.
    """

    unit: str
    shape: str
    key: str
    sparse_below: float
    otherwise: str

    def cells(self) -> dict[str, str]:
        return {
            "unit": self.unit,
            "outputs x inputs": self.shape,
            "sparse pays below density": f"{self.sparse_below:.2f}",
            "otherwise": self.otherwise,
        }


@dataclass
class Report:
    """All of one run. machine: from `hardware.describe`; settings: what was asked for."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[ModelRow] | list[KernelRow]
    crossovers: list[Crossover] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_format(form: str) -> None:
    """Refuse a form that does not exist (exit 2)."""
    if form not in FORMATS:
        raise UsageError(f"--format {form!r} does not exist", f"use one of {', '.join(FORMATS)}")


def render(report: Report, form: str) -> str:
    """The report as text in one of FORMATS."""
    check_format(form)
    if form == "md":
        return _markdown(report)
    if form == "csv":
        return _csv(report)
    if form == "json":
        return json.dumps(plain(report))
    head = {"machine": report.machine, "settings": report.settings}
    return "\n".join(json.dumps({**head, **row}) for row in plain(report)["rows"])


def plain(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    rows = []
    for row in report.rows:
        values = asdict(row)
        parts = {name: part for name, part in vars(row).items() if isinstance(part, (Stat, Quiet))}
        values.update({name: part.plain() for name, part in parts.items()})
        rows.append(values)
    crossovers = [asdict(crossover) for crossover in report.crossovers]
    return {
        "machine": report.machine, "settings": report.settings, "rows": rows,
        "crossovers": crossovers, "notes": report.notes,
    }  # fmt: skip


def _markdown(report: Report) -> str:
    parts = [_table(_cells(report.rows))]
    if report.crossovers:
        parts.append(_table([crossover.cells() for crossover in report.crossovers]))
    parts.append("\n".join(f"{name}: {value}" for name, value in report.machine.items()))
    parts.append("settings: " + ", ".join(f"{name} {value}" for name, value in report.settings.items()))
    parts += [f"note: {note}" for note in report.notes]
    return "\n\n".join(parts)


def _cells(rows: list[ModelRow] | list[KernelRow]) -> list[dict[str, str]]:
    """The rows' cells; of the quiet repetitions only where some were disturbed."""
    cells = [row.cells() for row in rows]
    found = [row.quiet_host for row in rows if isinstance(row, ModelRow) and row.quiet_host is not None]
    if all(all(quiet.each) for quiet in found):
        for line in cells:
            line.pop(QUIET_COLUMN, None)
    return cells


def _table(rows: list[dict[str, str]]) -> str:
    columns = list(rows[0])
    cells = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _csv(report: Report) -> str:
    """One line a row: statistics as name_mean, name_median and so on, then the machine. No samples."""
    lines = []
    for row in plain(report)["rows"]:
        flat: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, dict):
                flat.update({f"{name}_{k}": part for k, part in value.items() if not isinstance(part, list)})
            elif not isinstance(value, list):
                flat[name] = value
        lines.append({**flat, **report.machine})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def _speedup(value: Stat) -> str:
    return f"{value.median:.2f} ({min(value.samples):.2f}-{max(value.samples):.2f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "n/a" if value is None else f"{value / unit:.{digits}f}"
