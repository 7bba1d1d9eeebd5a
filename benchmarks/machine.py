"""Device, versions and commit of a measurement, and how a benchmark runs without an installed spqt."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def facts() -> str:
    """Device, cores, system and versions, such as `AMD EPYC, 2 cores, Linux x86_64, ..., spqt 1a2b3c4`."""
    import mlx.core as mx
    import psutil

    device = str(mx.device_info().get("device_name", "")) or platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return (
        f"{device}, {cores} cores, {system}, Python {platform.python_version()}, {versions}, spqt {commit()}"
    )


def commit() -> str:
    """The commit of this checkout, with `-dirty` when files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def from_bare_tree() -> None:
    """Link kernel bodies and presets into the package, as an installation places them, where it has none."""
    for name in ("metal", "configs"):
        try:
            __import__(f"spqt_cli.{name}")
        except ModuleNotFoundError:
            (ROOT / "spqt_cli" / name).symlink_to(Path("..") / name)
