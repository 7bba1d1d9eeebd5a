"""Wheel, sdist and editable install: each carries the kernels and presets, and one MLX pin rules all."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
import zlib
from importlib import metadata, resources
from pathlib import Path

import pytest

from tests import ROOT

DATA = {
    "spqt_cli/py.typed",
    "spqt_cli/configs/default.toml",
    "spqt_cli/configs/calibration.txt",
    "spqt_cli/metal/__init__.py",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and, built from that sdist alone, the wheel, its kernels not optimized."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": "SPQT_OPTIMIZE=-O0"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder


def kernels() -> set[str]:
    return {f"spqt_cli/metal/{path.name}" for path in (ROOT / "metal").glob("*.metal")}


def size_of(wheel: Path) -> int:
    """The bytes of a wheel whose extension is the one installed here, optimized as users get it."""
    files = zipfile.ZipFile(wheel).infolist()
    others = sum(one.compress_size for one in files if not one.filename.startswith("spqt_cli/_cpu"))
    installed = importlib.util.find_spec("spqt_cli._cpu")
    return others + (len(zlib.compress(Path(installed.origin).read_bytes())) if installed else 0)


def test_wheel_carries_kernels_and_presets(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert kernels(), "the repository has kernels"
    assert names >= DATA | kernels()
    assert not [name for name in names if name.startswith(("tests/", "cpu/", "benchmarks/"))]
    assert size_of(wheel) <= 2 * 2**20


def test_sdist_carries_sources_and_tests(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert names >= {
        "metal/__init__.py",
        "configs/default.toml",
        "cpu/CMakeLists.txt",
        "tests/conftest.py",
        "LICENSE",
    }
    assert {f"metal/{Path(name).name}" for name in kernels()} <= names


def test_wheel_installs_and_finds_its_data(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    code = (
        "import spqt_cli, pathlib; from importlib import resources; from spqt_cli.cli import presets;"
        "print(pathlib.Path(spqt_cli.__file__).parent, sorted(presets.names()),"
        "sorted(p.name for p in resources.files('spqt_cli.metal').iterdir() if p.name.endswith('.metal')))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],  # no .pth files: else this editable install would be found
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")]), "PATH": ""},
    )
    assert str(target) in result.stdout
    assert "default" in result.stdout
    for name in kernels():
        assert Path(name).name in result.stdout


def test_this_install_finds_its_data():
    """The suite runs from an editable install: it reads the working tree's files."""
    found = {item.name for item in resources.files("spqt_cli.metal").iterdir()}
    assert {Path(name).name for name in kernels()} <= found
    assert (resources.files("spqt_cli.configs") / "default.toml").is_file()


def test_one_mlx_pin_for_build_and_run(built):
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    (pin,) = [line.split("==")[1] for line in requires if line.startswith("mlx[")]
    assert metadata.version("mlx") == pin
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    lines = [line for line in archive.read(name).decode().splitlines() if "Requires-Dist: mlx" in line]
    pinned = {line for line in lines if not line.startswith("Requires-Dist: mlx-lm")}
    assert len(pinned) == 4  # Apple silicon, and the extras cpu, cuda12, cuda13
    assert all(f"=={pin}" in line for line in pinned)


def test_a_build_forgets_what_an_earlier_one_was_told():
    """CMake's cache stays in the build folder: what the Makefile sets has a value in other builds too."""
    told = re.findall(r"SKBUILD_CMAKE_DEFINE \??= (.*)", (ROOT / "Makefile").read_text())
    names = {one.partition("=")[0] for line in told for one in line.split(";")}
    defaults = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["cmake"]["define"]
    assert {"SPQT_NATIVE", "SPQT_OPTIMIZE"} <= names <= set(defaults)
