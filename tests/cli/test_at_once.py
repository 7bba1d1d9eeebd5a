"""`spqt convert --calibrate`: one command, one folder that appears with its thresholds or not at all."""

import os
from pathlib import Path

import pytest

from spqt_cli.calibrate import at_once
from spqt_cli.calibrate import calibrate as calibrator
from spqt_cli.cli import worker
from spqt_cli.convert import convert as converter
from spqt_cli.format.folder import Folder
from tests.cli.test_commands import assert_error, spqt


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text("[quantization]\ngroup_size = 32\n[calibration]\ntokens = 1024\nmethod = 'fast'\n")
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tiny.toml"}


def test_one_command_is_both(checkpoint: Path, tmp_path: Path, preset: Path):
    done = spqt("convert", checkpoint, "-o", tmp_path / "m", "--sparsity", 0.3, "--preset", preset)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    folder = Folder(tmp_path / "m")
    assert folder.calibration is not None
    assert folder.calibration.sparsity == 0.3
    assert names(tmp_path) == {"m"}
    assert f"{tmp_path / 'm'} has 14 Zigzag layers" in done.stdout.decode()
    assert "work" not in done.stdout.decode()
    assert said.index("calibrating takes about") < said.index("next: spqt compare")
    two_steps = tmp_path / "two"
    spqt("convert", checkpoint, "-o", two_steps, "--preset", preset)
    spqt("calibrate", two_steps, "--sparsity", 0.3, "--preset", preset)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (two_steps / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_an_interrupted_run_goes_on_and_converts_once(
    checkpoint: Path, tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ("convert", checkpoint, "-o", tmp_path / "m", "--calibrate", "--preset", preset)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    real = at_once.calibrate
    monkeypatch.setattr(at_once, "calibrate", interrupted)
    done = spqt(*command)
    assert done.returncode == 130
    assert b"the same command goes on" in done.stderr
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(at_once, "calibrate", real)
    monkeypatch.setattr(converter, "convert", interrupted)
    assert spqt(*command).returncode == 0
    assert Folder(tmp_path / "m").calibration is not None
    assert names(tmp_path) == {"m"}


def test_other_settings_of_the_calibration_begin_only_that_anew(
    checkpoint: Path, tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken_off(done: float, total: float, what: str) -> None:
        if what == "refining thresholds":
            raise KeyboardInterrupt

    wishes = converter.ConvertOptions(group_size=32)
    job = at_once.name_of(str(checkpoint), wishes, None)
    convert = lambda folder: converter.convert(str(checkpoint), folder, wishes)  # noqa: E731
    first, second = (calibrator.CalibrateOptions(tokens=1024, sparsity=s, method="fast") for s in (0.3, 0.5))
    with pytest.raises(KeyboardInterrupt):
        at_once.run(tmp_path / "m", job, convert, first, broken_off)
    converted, found = at_once.run(tmp_path / "m", job, pytest.fail, second, lambda *_: None)
    assert converted is None
    assert found.sparsity == 0.5
    assert found.folder == tmp_path / "m"


def test_where_calibration_is_refused_the_conversion_is_not_lost(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Path
):
    preset.write_text("[quantization]\ngroup_size = 32\n[calibration]\ntokens = 100000000\n")
    done = spqt("convert", checkpoint, "-o", tmp_path / "m", "--calibrate", "--preset", preset, "--quiet")
    assert done.returncode == 3
    assert f"spqt calibrate {tmp_path / 'm'}" in done.stderr.decode()
    assert Folder(tmp_path / "m").calibration is None
    assert names(tmp_path) == {"m"}


def test_wrong_values_are_refused_before_the_work(checkpoint: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / "m", "--sparsity", 2), 2, "0.95")
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / "full", "--calibrate"), 7, "not empty")
    assert_error(spqt("convert", "gone", "-o", tmp_path / "m", "--calibrate"), 3, "not found")
    assert names(tmp_path) == {"full"}


def test_a_dry_run_says_what_the_sparsity_asked_for_brings(checkpoint: Path, tmp_path: Path):
    shown = spqt("convert", checkpoint, "-o", tmp_path / "m", "--sparsity", 0.5, "--dry-run").stdout.decode()
    assert "at 50% sparsity (as asked for)" in shown
    assert max(map(len, shown.splitlines())) <= 80
    before, after = (line.split() for line in shown.splitlines() if line.startswith(("before", "after")))
    assert float(before[1]) == pytest.approx(
        (checkpoint / "model.safetensors").stat().st_size / 1e6, abs=0.05
    )
    assert 0 < float(after[1]) < float(before[1])
    assert not (tmp_path / "m").exists()
