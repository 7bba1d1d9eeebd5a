"""The CPU extension where it can't be had: no compiler, another MLX, a machine it fails on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from spqt_cli.backends import cpu, cpu_settings
from spqt_cli.errors import BackendError, UsageError
from tests import ROOT


@pytest.fixture
def fresh(monkeypatch):
    """`cpu` without what it remembers of the installed extension."""
    cpu._extension.cache_clear()
    yield monkeypatch
    cpu._extension.cache_clear()


def stand_in(**changes):
    """An extension that does nothing but answer the questions asked before it is used."""

    def product(*_):
        return [mx.full((32,), 6.0)], mx.array([1], mx.uint32)

    answers = {
        "mlx_version": lambda: mx.__version__,
        "running_mlx_version": lambda: mx.__version__,
        "sparse_gemv": product,
        "set_threads": lambda count: None,
        "threads": lambda: 1,
        "isa": lambda: "baseline",
        "isas": lambda: ["baseline"],
        "use_isa": lambda name: name == "baseline",
    }
    return SimpleNamespace(**(answers | changes))


def test_no_compiler_configures_without_the_extension(tmp_path):
    beside = os.pathsep.join(
        (str(Path(sys.executable).parent), os.environ["PATH"])
    )  # where `.[dev]` puts them
    cmake, ninja = (shutil.which(name, path=beside) for name in ("cmake", "ninja"))
    assert cmake
    assert ninja
    # cmake asks the build program for its version, even for no language
    command = [cmake, "-S", ROOT / "cpu", "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stderr
    assert not list(tmp_path.rglob("*_cpu*"))


def test_not_built_says_how_to_mend(fresh):
    fresh.setitem(sys.modules, "spqt_cli._cpu", None)  # import then raises ModuleNotFoundError
    usable, reason = cpu.status()
    assert not usable
    assert "C++ compiler" in reason


def test_library_that_does_not_load(fresh):
    def broken(name):
        raise ImportError("undefined symbol: mlx_something")

    fresh.setattr(cpu.importlib, "import_module", broken)
    usable, reason = cpu.status()
    assert not usable
    assert "undefined symbol" in reason


def test_other_mlx_is_found_before_a_call(fresh):
    def never(*_):
        raise AssertionError("called in spite of another MLX")

    other = stand_in(mlx_version=lambda: "0.0.1", sparse_gemv=never)
    fresh.setattr(cpu.importlib, "import_module", lambda name: other)
    usable, reason = cpu.status()
    assert not usable
    assert "0.0.1" in reason


def test_call_that_raises_is_explained(fresh):
    def foreign(*_):
        raise TypeError("incompatible function arguments\nand much more")

    fresh.setattr(cpu.importlib, "import_module", lambda name: stand_in(sparse_gemv=foreign))
    assert cpu.status()[0] is False
    assert "incompatible function arguments" in cpu.status()[1]
    assert "much more" not in cpu.status()[1]


def test_wrong_numbers_are_noticed(fresh):
    def wrong(*_):
        return [mx.zeros((32,))], mx.array([1], mx.uint32)

    fresh.setattr(cpu.importlib, "import_module", lambda name: stand_in(sparse_gemv=wrong))
    assert cpu.status() == (False, f"it fails on this machine (wrong numbers): {cpu._REINSTALL}")


def test_good_extension_is_used(fresh):
    fresh.setattr(cpu.importlib, "import_module", lambda name: stand_in())
    assert cpu.status() == (True, "baseline kernels, 1 threads")


@pytest.mark.parametrize("wish", ["sse", "AVX2", " ", "9" * 5000])
def test_instruction_set_from_the_environment_is_checked(fresh, wish):
    fresh.setattr(cpu.importlib, "import_module", lambda name: stand_in())
    fresh.setenv("SPQT_ISA", wish)
    with pytest.raises(UsageError, match="SPQT_ISA") as error:
        cpu.status()
    assert "avx512vnni, avx512, avx2, baseline" in error.value.hint


def test_instruction_set_that_the_machine_lacks(fresh):
    fresh.setattr(cpu.importlib, "import_module", lambda name: stand_in())
    fresh.setenv("SPQT_ISA", "avx512")
    with pytest.raises(BackendError, match="avx512") as error:
        cpu.status()
    assert error.value.hint == "set it to one of baseline"


def test_instruction_set_from_the_environment_runs():
    """In a process of its own: what is asked of the extension there is the environment's choice alone."""
    for name in cpu.isas():
        command = [sys.executable, "-m", "spqt_cli", "doctor"]
        chosen = {**os.environ, "SPQT_ISA": name}
        done = subprocess.run(command, env=chosen, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{name} kernels" in done.stdout


@pytest.mark.parametrize("wish", ["0", "-1", "two", "1.5", "100000", "9" * 5000])
def test_threads_from_the_environment_are_checked(monkeypatch, wish):
    monkeypatch.setenv("SPQT_THREADS", wish)
    with pytest.raises(UsageError, match="SPQT_THREADS"):
        cpu_settings.default_threads()


def test_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("SPQT_THREADS", "3")
    assert cpu_settings.default_threads() == 3


def test_a_container_share_limits_threads(monkeypatch, tmp_path):
    monkeypatch.delenv("SPQT_THREADS", raising=False)
    monkeypatch.setattr(cpu_settings.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(cpu_settings.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cpu_settings, "_CGROUP_QUOTA", quota)
    assert cpu_settings.default_threads() == 6
    quota.write_text("max 100000\n")
    assert cpu_settings.default_threads() == 6
    quota.write_text("250000 100000\n")
    assert cpu_settings.default_threads() == 2
