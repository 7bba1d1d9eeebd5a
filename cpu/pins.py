"""The MLX that is run is the MLX that was built against: one pin, in `build-system.requires`.

A metadata provider of scikit-build-core; it adds MLX to the requirement lists of pyproject.toml and
names no version of its own.
"""

import re
import tomllib
from pathlib import Path
from typing import Any


def mlx_version() -> str:
    """The exact MLX version of `build-system.requires`."""
    requires = tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]
    return next(match[1] for line in requires if (match := re.fullmatch(r"mlx\[cpu\]==([\w.]+)", line)))


def dynamic_metadata(settings: Any, project: Any) -> dict[str, Any]:
    """MLX by platform: a plain requirement on Apple silicon, an extra elsewhere."""
    mlx = mlx_version()
    return {
        "dependencies": [f"mlx=={mlx}; platform_system == 'Darwin' and platform_machine == 'arm64'"],
        "optional-dependencies": {name: [f"mlx[{name}]=={mlx}"] for name in ("cpu", "cuda12", "cuda13")},
    }
