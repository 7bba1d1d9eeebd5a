"""`spqt fit` and `spqt convert --fit`: flags, output, and what a person is told."""

import json

import pytest

from spqt_cli.format.folder import Folder
from tests.cli.test_commands import assert_error, spqt

QUICK = ("--own-text", 4)


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
    assert_error(spqt("convert", checkpoint, "-o", tmp_path / "m", *arguments), code, *words)
    assert not list(tmp_path.iterdir())
