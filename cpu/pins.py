"""Requirements of the installed package, derived from the one MLX pin in pyproject.toml.

A scikit-build-core metadata provider. It owns the list of run-time requirements and refuses
to name an MLX version of its own: that stands in `build-system.requires`.
"""

import re
import tomllib
from pathlib import Path

ALWAYS = [
    "mlx-lm==0.32.2",
    "typer>=0.26",
    "rich>=13",
    "safetensors>=0.8,<0.9",
    "gguf>=0.19,<0.20",
    "filelock>=3.20",
    "psutil>=7",
]
DEVELOPMENT = ["pytest>=9", "ruff==0.17.6", "mypy==2.4.1", "hypothesis>=6.170", "pytest-timeout>=2.4"]


def mlx_version() -> str:
    """The exact MLX version of `build-system.requires`."""
    requires = tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]
    return next(match[1] for line in requires if (match := re.fullmatch(r"mlx\[cpu\]==([\w.]+)", line)))


def dynamic_metadata(field: str, settings: dict | None = None, project: dict | None = None):
    """The value of `dependencies` or `optional-dependencies`."""
    mlx = mlx_version()
    if field == "dependencies":
        return [*ALWAYS, f"mlx=={mlx}; platform_system == 'Darwin' and platform_machine == 'arm64'"]
    extras = {name: [f"mlx[{name}]=={mlx}"] for name in ("cpu", "cuda12", "cuda13")}
    return {**extras, "dev": DEVELOPMENT}
