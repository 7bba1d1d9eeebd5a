"""`spqt doctor`: the machine, the backend that runs on it and why, and whether its kernels are right."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Annotated, Any

import typer

from spqt_cli.cli.flags import Json
from spqt_cli.cli.output import as_json


def doctor(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Run every kernel against its definition.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Say what this machine has and which backend spqt uses; check its kernels."""
    report = examine()
    if not json_output:
        typer.echo(report.text())
    if selftest and not json_output:
        typer.echo(legend())
    for row in judged() if selftest else ():
        if not json_output:
            head = [] if report.kernels else ["", line({name: name for name in row})]
            typer.echo("\n".join([*head, line(row)]))
        report.kernels.append(row)
    report.healthy = all(row["pass"] for row in report.kernels)
    if json_output:
        typer.echo(as_json(report))
    elif selftest:
        typer.echo("all kernels agree with the definition" if report.healthy else "A KERNEL IS WRONG")
    if not report.healthy:
        raise typer.Exit(6)


LEGEND = (
    "\nworst error: the largest difference from the definition, in units of what rounding may cost; up to 1\n"
    "passes. shape: outputs x inputs; group: outputs that share a scale"
)


def legend() -> str:
    """What the table's columns and its last rows mean, with units and limits."""
    from spqt_cli.bench import thousand_tokens

    return f"{LEGEND}\n{thousand_tokens.LEGEND}"


@dataclass
class Report:
    """The findings; `kernels` is empty unless the self-test ran, `many_rows` where nothing is measured.

    experts: what becomes of a mixture's in decode steps.
    """

    machine: dict[str, str]
    backend: str
    reason: str
    healthy: bool = True
    experts: str = ""
    many_rows: list[str] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """Machine and backend, ready to paste into an issue."""
        lines = [f"{name:<12} {value}" for name, value in self.machine.items()]
        lines.append(f"{'backend':<12} {self.backend} ({self.reason})")
        lines.append(f"{'experts':<12} {self.experts}")
        lines += [f"{'many rows' if i == 0 else '':<12} {line}" for i, line in enumerate(self.many_rows)]
        return "\n".join(lines)


WIDTHS = {"kernel": 26, "shape": 18, "bits": 4, "group": 5, "dtype": 8, "worst error": 11}


def line(row: dict[str, Any]) -> str:
    """A row of the self-test's table; printed before the next is known, so that widths are fixed."""
    return "  ".join(str(cell).ljust(WIDTHS.get(name, 0)) for name, cell in row.items())


def examine() -> Report:
    """Look at the machine."""
    from spqt_cli.backends import select

    backend = select.backend()
    many_rows = backend.many_rows() if backend.many_rows else []
    experts = "skipped by channel" if backend.skips_experts else "masked and read whole: no kernel for them"
    return Report(_machine(), backend.name, backend.reason, experts=experts, many_rows=many_rows)


def judged() -> Iterator[dict[str, Any]]:
    """The self-test's rows: each kernel of the backend against the definition, then a model decoded twice."""
    from spqt_cli.backends import selftest
    from spqt_cli.bench import thousand_tokens

    yield from selftest.run()
    yield from thousand_tokens.rows()


def _machine() -> dict[str, str]:
    import mlx.core as mx
    import psutil

    from spqt_cli.version import __version__

    device = mx.device_info()
    return {
        "spqt": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device.get("device_name", mx.default_device())),
        "cores": f"{psutil.cpu_count(logical=False) or os.cpu_count()} physical",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
