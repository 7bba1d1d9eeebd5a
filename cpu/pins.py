"""The MLX that is run is the MLX that was built against: one pin, in `build-system.requires`.

A metadata provider of scikit-build-core; it adds MLX to the requirement lists of pyproject.toml and
names no version of its own.
"""

import re
import tomllib
from pathlib import Path
from typing import Any


def build_requirements() -> list[str]:
    """`build-system.requires` of pyproject.toml."""
    return tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]


def dynamic_metadata(settings: Any, project: Any) -> dict[str, Any]:
    """MLX by platform: a plain requirement on Apple silicon, an extra elsewhere.

    `dev` gets what a build without isolation needs, so that the tests of the packages run offline.
    """
    requires = build_requirements()
    mlx = next(match[1] for line in requires if (match := re.fullmatch(r"mlx\[cpu\]==([\w.]+)", line)))
    extras = {name: [f"mlx[{name}]=={mlx}"] for name in ("cpu", "cuda12", "cuda13")}
    extras["dev"] = [line for line in requires if not line.startswith("mlx")]
    return {
        "dependencies": [f"mlx=={mlx}; platform_system == 'Darwin' and platform_machine == 'arm64'"],
        "optional-dependencies": extras,
    }
