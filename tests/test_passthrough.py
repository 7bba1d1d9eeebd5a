"""`spqt mlx-lm ...` and plain mlx-lm on converted folders: one works, the other refuses."""

import json
import shutil
import subprocess
import sys

import pytest

from spqt_cli import worker
from tests.test_cli import assert_error, process


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(worker.MARK, raising=False)


def test_passthrough_runs_mlx_lm_on_a_converted_model(calibrated):
    result = process("mlx-lm", "generate", "--model", calibrated, "--prompt", "fox", "--max-tokens", "4")
    assert result.returncode == 0, result.stderr.decode()
    assert b"tokens-per-sec" in result.stdout
    assert b"prompts run dense, generated tokens at 40% sparsity, in batches too" in result.stderr


def test_passthrough_checks_the_model_first(calibrated, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(calibrated, damaged)
    config = json.loads((damaged / "config.json").read_text())
    config["spqt"]["format_version"] = 99
    (damaged / "config.json").write_text(json.dumps(config))
    assert_error(process("mlx-lm", "generate", "--model", damaged, "--prompt", "x"), 4, "upgrade")


def test_passthrough_derives_sparsity_from_the_environment(calibrated):
    command = ("mlx-lm", "generate", "--model", calibrated, "--prompt", "fox", "-m", "8")
    dense, sparse = (process(*command, SPQT_SPARSITY=wish) for wish in ("0", "0.9"))
    assert dense.stdout.split(b"==========")[1] != sparse.stdout.split(b"==========")[1]
    assert b"all runs dense, nothing is skipped" in dense.stderr
    assert b"generated tokens at 90% sparsity" in sparse.stderr
    assert_error(process(*command, SPQT_SPARSITY="2"), 2, "SPQT_SPARSITY")


def test_plain_mlx_lm_refuses_a_converted_model(converted):
    code = f"import mlx_lm; mlx_lm.load({str(converted)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "spqt" in result.stderr or "zigzag" in result.stderr


def test_python_code_needs_one_import(converted):
    code = (
        "import spqt_cli.patch, mlx_lm;"
        f"model, tokenizer = mlx_lm.load({str(converted)!r});"
        "print(mlx_lm.generate(model, tokenizer, 'fox', max_tokens=4))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_share_without_thresholds_is_refused(converted):
    command = ("mlx-lm", "generate", "--model", converted, "--prompt", "fox", "-m", "8")
    assert_error(process(*command, SPQT_SPARSITY="0.3"), 3, "no thresholds", "spqt calibrate")


@pytest.mark.parametrize("arguments", [["nosuch"], ["generate", "--model", "no/where"]])
def test_what_fails_in_mlx_lm_is_not_called_a_bug_of_ours(arguments):
    assert_error(process("mlx-lm", *arguments), 3, "mlx-lm's own command failed", "hint")
