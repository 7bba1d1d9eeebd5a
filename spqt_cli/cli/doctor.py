"""`spqt doctor`: the machine, the backend that runs on it and why, and whether its kernels are right."""

import os
import platform
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
    report = examine(selftest)
    typer.echo(as_json(report) if json_output else report.text())
    if not report.healthy:
        raise typer.Exit(6)


@dataclass
class Report:
    """The findings; `kernels` is empty unless the self-test ran, `many_rows` where nothing is measured."""

    machine: dict[str, str]
    backend: str
    reason: str
    healthy: bool = True
    many_rows: list[str] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """Ready to paste into an issue."""
        lines = [f"{name:<12} {value}" for name, value in self.machine.items()]
        lines.append(f"{'backend':<12} {self.backend} ({self.reason})")
        lines += [f"{'many rows' if i == 0 else '':<12} {line}" for i, line in enumerate(self.many_rows)]
        if self.kernels:
            lines.append("")
            columns = list(self.kernels[0])
            rows = [columns, *([str(row[column]) for column in columns] for row in self.kernels)]
            widths = [max(len(row[at]) for row in rows) for at in range(len(columns))]
            for row in rows:
                lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
            lines.append("all kernels agree with the definition" if self.healthy else "A KERNEL IS WRONG")
        return "\n".join(lines)


def examine(selftest: bool) -> Report:
    """Look at the machine; with `selftest`, run every kernel of its backend against the definition."""
    from spqt_cli.backends import select

    backend = select.backend()
    many_rows = backend.many_rows() if backend.many_rows else []
    report = Report(_machine(), backend.name, backend.reason, many_rows=many_rows)
    if selftest:
        from spqt_cli.backends import selftest as checks

        report.kernels = checks.run()
        report.healthy = all(row["pass"] for row in report.kernels)
    return report


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
