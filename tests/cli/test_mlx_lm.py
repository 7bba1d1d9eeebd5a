"""`spqt mlx-lm ...` and plain mlx-lm on converted folders: one works, the other refuses."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest

from spqt_cli.cli import mlx_lm, worker
from spqt_cli.decode import layers
from spqt_cli.errors import SpqtError, UnsupportedError
from tests.cli.test_commands import assert_error, process


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


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("convert", "--hf-path"), ("convert", "--model"), ("fuse", "--model"),
        ("awq", "-m"), ("gptq", "-m"), ("dynamic_quant", "--model"), ("dwq", "--quantized-model"),
    ],
)  # fmt: skip
def test_what_can_not_work_on_a_converted_model_is_refused_before_any_work(
    converted, monkeypatch, command, flag
):
    monkeypatch.setattr(mlx_lm, "_hand_over", lambda: pytest.fail("mlx-lm was called"))
    with pytest.raises(UnsupportedError, match=f"mlx-lm's {command} can't take .*, a converted model") as one:
        mlx_lm.run([command, flag, str(converted), "--mlx-path", "x"])
    assert one.value.hint


def test_a_converted_model_that_no_flag_shows_is_refused_when_it_is_loaded(converted, monkeypatch):
    from mlx_lm import cli, load

    monkeypatch.setattr(cli, "main", lambda: load(str(converted)))  # as a hub id or a file of settings
    monkeypatch.setattr(sys, "argv", ["spqt"])
    with pytest.raises(UnsupportedError, match="mlx-lm's fuse can't take a converted model"):
        mlx_lm.run(["fuse", "--model", "org/model"])
    assert layers.zigzag_layers(load(str(converted))[0])


def test_the_number_of_tokens_is_no_model(calibrated, monkeypatch):
    handed = []
    monkeypatch.setattr(mlx_lm, "_hand_over", lambda: handed.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["spqt"])
    mlx_lm.run(["generate", "--model", str(calibrated), "-m", "4"])
    assert handed == [["mlx_lm", "generate", "--model", str(calibrated), "-m", "4"]]


def test_a_missing_folder_is_told_without_asking_the_hub(tmp_path):
    with pytest.raises(SpqtError, match="is not found"):
        mlx_lm.run(["generate", "--model", str(tmp_path / "missing")])


def test_a_command_that_exits_with_a_code_of_its_own_is_an_error(monkeypatch):
    from mlx_lm import cli

    def leave(code: int) -> None:
        monkeypatch.setattr(cli, "main", lambda: sys.exit(code))
        mlx_lm.run(["share"])

    monkeypatch.setattr(sys, "argv", ["spqt"])
    with pytest.raises(SpqtError, match="ended with 1"):
        leave(1)
    for code in (0, 2):
        with pytest.raises(SystemExit):
            leave(code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_at_the_first_signal(calibrated, number):
    server = serving(calibrated)
    server.send_signal(number)
    assert server.wait(timeout=20) == 128 + number


def test_a_port_that_is_taken_ends_the_server(calibrated):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ("mlx-lm", "server", "--model", calibrated, "--port", port)
        result = process(*command)
    assert result.returncode == 3
    assert b"Address already in use" in result.stderr


def serving(model) -> subprocess.Popen:
    """A server that has begun to listen."""
    command = [sys.executable, "-m", "spqt_cli", "mlx-lm", "server", "--model", str(model), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    said = ""
    while "Starting httpd" not in said:
        line = server.stderr.readline()
        assert line, said
        said += line
    time.sleep(0.2)  # from the line to the loop
    return server
