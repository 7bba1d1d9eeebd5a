"""`spqt fit` and `spqt convert --fit`: flags, output, and what a person is told."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest

from spqt_cli.calibrate import cost as calibrate_cost
from spqt_cli.cli import dry_run, worker
from spqt_cli.fit import cost
from spqt_cli.format.folder import Folder
from tests.cli.test_commands import assert_error, spqt

QUICK = ("--own-text", 4)


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


def test_convert_fits_at_once_and_inspect_says_so(checkpoint, tmp_path):
    made = spqt("convert", checkpoint, "-o", tmp_path / "m", "--q-group-size", 32, "--fit", "gptq", *QUICK)
    assert made.returncode == 0, made.stderr
    assert b"layers fitted (gptq) on 4 texts" in made.stdout
    assert "Fitted to its source (gptq), on 4 texts." in (tmp_path / "m" / "README.md").read_text()
    assert b"fitting takes about" in made.stderr  # said before it starts
    assert (
        b"fitted: method gptq, 4 texts, 4 of them written by the source"
        in spqt("inspect", tmp_path / "m").stdout
    )


def test_fit_of_a_converted_folder_as_json(checkpoint, converted, tmp_path):
    made = spqt("fit", converted, checkpoint, "-o", tmp_path / "m", "--json", *QUICK)
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert (said["method"], said["windows"], said["conversion"]) == ("gptq", 4, None)
    assert Folder(tmp_path / "m").verify()


def test_a_dry_run_fits_nothing(checkpoint, tmp_path):
    made = spqt("convert", checkpoint, "-o", tmp_path / "m", "--fit", "gptq", "--dry-run")
    assert made.returncode == 0
    assert not list(tmp_path.iterdir())


def asked(monkeypatch, estimates, command):
    """What a command's estimate is asked, of which only the first is made: it ends there."""
    found = []

    def seconds(layers, weights, *more, **named):
        layers = layers.values() if isinstance(layers, dict) else layers
        found.append((sorted((one.inputs, one.outputs) for one in layers), weights, more, named))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(estimates, "seconds", seconds)
        assert spqt(*command).returncode == 130
    return found[0]


@pytest.mark.parametrize("fit", [("gptq", "--own-text", 4), ("full", "--own-text", 4, "--train-steps", 3)])
def test_a_dry_run_estimates_what_the_fit_does(checkpoint, tmp_path, monkeypatch, fit):
    command = ("convert", checkpoint, "-o", tmp_path / "m", "--q-group-size", 32, "--fit", *fit)
    dry = asked(monkeypatch, cost, (*command, "--dry-run"))
    assert dry == asked(monkeypatch, cost, command)


def test_a_dry_run_estimates_what_the_calibration_does(checkpoint, converted, tmp_path, monkeypatch):
    preset = tmp_path / "p.toml"
    preset.write_text('[quantization]\ngroup_size = 32\n[calibration]\ntokens = 1024\nmethod = "fast"\n')
    flags = ("--preset", preset, "--sparsity", 0.3)
    shutil.copytree(converted, tmp_path / "m")
    dry = asked(
        monkeypatch, calibrate_cost, ("convert", checkpoint, "-o", tmp_path / "n", *flags, "--dry-run")
    )
    assert dry == asked(monkeypatch, calibrate_cost, ("calibrate", tmp_path / "m", *flags))


def test_a_dry_run_says_what_follows(checkpoint, tmp_path):
    flags = ("--fit", "full", "--own-text", 4, "--train-steps", 3, "--sparsity", 0.3, "--dry-run")
    shown = spqt("convert", checkpoint, "-o", tmp_path / "m", *flags).stdout.decode()
    assert max(map(len, shown.splitlines())) <= 80
    fit, calibration = re.findall(r"^then .*(?:\n    .*)*", shown, re.M)
    assert re.fullmatch(
        r"then fit: full, on 4 texts of 512 tokens that the source writes, 3 steps of training; "
        r"about \d+ seconds here; while it writes it takes \d MB of memory, without keys and values",
        " ".join(fit.split()),
    )
    assert re.fullmatch(
        r"then calibrate: 30% sparsity \(as asked for\), method auto, on 8192 tokens of the shipped text; "
        r"about \d+ seconds here",
        " ".join(calibration.split()),
    )
    plain = spqt("convert", checkpoint, "-o", tmp_path / "m", "--dry-run")
    assert b"\nthen" not in plain.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [1e6, 1e4])
def test_a_dry_run_says_that_the_source_does_not_fit(checkpoint, tmp_path, monkeypatch, room):
    monkeypatch.setattr(dry_run.psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    flags = ("--fit", "gptq", "--dry-run", "--json")
    found = json.loads(spqt("convert", checkpoint, "-o", tmp_path / "m", *flags).stdout)
    says = "read in 8 bits" if room == 1e6 else "give a text, --own-text 0 --data FILE"
    assert says in found["then"][0]["said"]
    assert found["then"][0]["memory_bytes"] > 0.7 * room


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--fit", "best"], 2, ("no fit 'best'", "gptq")),
        (["--fit", "gptq", "--own-text", 0], 2, ("no text", "--data")),
        (["--fit", "gptq", "--data", "missing.txt"], 3, ("missing.txt",)),
        (["--fit", "gptq", "--train-steps", 3], 2, ("--train-steps", "--fit full")),
        (["--train-steps", 3], 2, ("--train-steps", "--fit full")),
        (["--own-text", 3], 2, ("--own-text", "--fit gptq")),
    ],
)
def test_bad_wishes(checkpoint, tmp_path, arguments, code, words):
    for dry in ((), ("--dry-run",)):
        assert_error(spqt("convert", checkpoint, "-o", tmp_path / "m", *arguments, *dry), code, *words)
    assert not list(tmp_path.iterdir())
