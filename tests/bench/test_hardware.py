"""Facts of the machine: versions, commit, copy bandwidth, energy."""

import mlx.core as mx
import pytest

from spqt_cli import __version__
from spqt_cli.bench import hardware, model_timing


def test_versions_and_device_are_named():
    facts = hardware.describe()
    assert facts["mlx"] == mx.__version__
    assert facts["spqt"] == __version__
    assert all(facts[name] for name in ("device", "system", "backend", "mlx_lm", "commit", "python"))


def test_the_commit_can_be_told():
    assert hardware.describe("abc1234")["commit"] == "abc1234"


def test_outside_a_checkout_the_version_stands_for_the_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "spqt_cli" / "bench" / "hardware.py"))
    assert hardware._commit() == f"v{__version__}"


def test_a_copy_counts_what_is_read_and_written(monkeypatch):
    """1 MiB copied in a second by every thread together: 2 MiB/s, whatever the number of threads."""
    monkeypatch.setattr(hardware, "COPY_BYTES", {"cpu": 1 << 20, "gpu": 1 << 20})
    clock = iter(range(100))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    assert hardware._cpu_copy() == [2 << 20] * hardware.COPY_SAMPLES
    assert hardware._gpu_copy() == [2 << 20] * hardware.COPY_SAMPLES


def test_energy_is_read_where_the_system_lets_us(monkeypatch, tmp_path):
    counter = tmp_path / "energy_uj"
    counter.write_text("1500000\n")
    monkeypatch.setattr(hardware, "RAPL", counter)
    monkeypatch.setattr(hardware.mx, "default_device", lambda: mx.Device(mx.cpu))
    energy = hardware.Energy()
    assert energy.joules() == 1.5
    assert "RAPL" in energy.source


def test_energy_is_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "RAPL", tmp_path / "missing")
    monkeypatch.setattr(hardware.mx, "default_device", lambda: mx.Device(mx.cpu))
    energy = hardware.Energy()
    assert energy.joules() is None
    assert energy.source.startswith("n/a")


@pytest.mark.parametrize(
    ("before", "after", "spent"), [(1.0, 3.5, 2.5), (None, 1.0, None), (1.0, None, None), (9.0, 1.0, None)]
)
def test_a_counter_that_began_anew_tells_nothing(before, after, spent):
    assert model_timing._spent(before, after) == spent
