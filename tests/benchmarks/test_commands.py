"""Every benchmark starts: what it imports of the package exists, and `--help` says how it is called."""

import subprocess
import sys

import pytest

from tests import ROOT

PARTS = (
    "machine",
    "cpu_experts",
    "cpu_ops",
    "cpu_rows",
    "gpu_launches",
    "gpu_rows",
    "lossless_chains",
    "lossless_costs",
)  # of other commands
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in PARTS)
if not SCRIPTS:
    pytest.skip("benchmarks/ is not part of a source archive", allow_module_level=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_command(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert f"python -m benchmarks.{name}" in shown.stdout
