"""Adapters on the command line: trained, put on, converted, fused; others' refused in a line."""

import json
import os
import shutil
import sys

import mlx.core as mx
import pytest
from mlx_lm.utils import load_adapters

from spqt_cli.cli import mlx_lm, worker
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from tests.adapt import test_peft
from tests.cli.test_commands import assert_error, spqt
from tests.cli.test_serve import running
from tests.conftest import tiny_checkpoint
from tests.decode.test_generate import dequantized_copy, token_ids
from tests.lib import adapters
from tests.lib.converting import run_path
from tests.lib.serving import exchange, request


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


@pytest.fixture(scope="module")
def lora(converted, tmp_path_factory):
    """A random adapter for the tiny model; shared: don't write to it."""
    plain = dequantized_copy(session.load(converted, dense=True))
    return adapters.write(tmp_path_factory.mktemp("adapter"), plain, "lora")


@pytest.fixture
def damaged(lora, tmp_path):
    return shutil.copytree(lora, tmp_path / "damaged")


def generated(model, *flags):
    result = spqt("generate", model, "-p", "the fox", "-m", 8, "--json", *flags)
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)["text"]


def training(folder, *flags):
    """The arguments of mlx-lm's `lora` for some lines of text, and the folder that it is to write."""
    data = folder / "data"
    data.mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"the quick brown fox jumps over the lazy dog {i}"}) for i in range(4)]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    output = folder / "trained"
    sizes = ("--iters", 2, "--batch-size", 2, "--num-layers", -1, "--val-batches", 1)
    return ("--train", "--data", data, *sizes, "--adapter-path", output, *flags), output


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_lora_trains_on_a_converted_model(calibrated, tmp_path, monkeypatch, kind):
    arguments, output = training(tmp_path, "--fine-tune-type", kind, "--learning-rate", "1e-2")
    monkeypatch.setattr(sys, "argv", ["spqt"])
    mlx_lm.run(["lora", "--model", *map(str, (calibrated, *arguments))])
    trained = mx.load(str(output / "adapters.safetensors"))
    assert all(array.any().item() for name, array in trained.items() if name.endswith("lora_b"))
    assert generated(calibrated, "--adapter-path", output) != generated(calibrated)


def test_an_adapter_runs_in_mlx_lms_own_commands(calibrated, lora, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spqt"])
    answers = []
    for flags in ([], ["--adapter-path", str(lora)]):
        mlx_lm.run(["generate", "--model", str(calibrated), "--prompt", "the fox", "-m", "8", *flags])
        answers.append(capsys.readouterr().out.split("==========")[1].strip())
    assert answers[0] != answers[1]


def test_a_server_with_an_adapter_answers_with_it(calibrated, lora):
    with running(calibrated, "--adapter-path", lora) as (_, port, _):
        status, body = exchange(port, request({"prompt": "the fox", "max_tokens": 8}))
    assert status == 200
    wanted = generated(calibrated, "--adapter-path", lora, "--ignore-chat-template")
    assert json.loads(body)["choices"][0]["text"] == wanted
    assert wanted != generated(calibrated, "--ignore-chat-template")


def test_peft_and_fuse_by_command(calibrated, tmp_path):
    test_peft.write(tmp_path / "peft")
    result = spqt("adapter", tmp_path / "peft", "-o", tmp_path / "adapter")
    assert b"lora adapter of 6 layers, rank 4" in result.stdout, result.stderr.decode()
    result = spqt("fuse", calibrated, tmp_path / "adapter", "-o", tmp_path / "fused", "--json")
    assert json.loads(result.stdout)["layers"] == 6, result.stderr.decode()
    assert spqt("verify", tmp_path / "fused").returncode == 0
    assert_error(spqt("fuse", calibrated, tmp_path / "adapter", "-o", tmp_path / "fused"), 7, "not empty")
    assert_error(spqt("adapter", tmp_path / "peft", "-o", tmp_path / "adapter"), 7, "not empty")
    near = ("is not found", f"near it: {tmp_path / 'peft'}")
    assert_error(spqt("adapter", tmp_path / "pef", "-o", tmp_path / "new"), 3, *near)
    weights = tmp_path / "adapter" / "adapters.safetensors"
    assert_error(spqt("adapter", weights, "-o", tmp_path / "new"), 3, "is no folder")


def test_a_peft_adapter_is_recognized(converted, tmp_path, monkeypatch):
    test_peft.write(tmp_path)
    for command in ("generate", "fuse"):
        flags = ("-p", "fox", "--adapter-path") if command == "generate" else ()
        result = spqt(command, converted, *flags, tmp_path, *(() if flags else ("-o", tmp_path / "out")))
        assert_error(result, 3, "is a PEFT adapter", "spqt adapter")
    monkeypatch.setattr(mlx_lm, "_hand_over", lambda: pytest.fail("mlx-lm was called"))
    for command in mlx_lm.ADAPTED:
        with pytest.raises(SpqtError, match="is a PEFT adapter"):
            mlx_lm.run([command, "--model", str(converted), f"--adapter-path={tmp_path}"])


def test_an_adapter_of_another_model(lora, tmp_path):
    wider = tiny_checkpoint(tmp_path / "wider", hidden_size=128)
    result = spqt("generate", run_path(wider, tmp_path / "a"), "-p", "fox", "--adapter-path", lora)
    assert_error(result, 3, "does not fit the model", "adapter shape (64, 4) does not match")
    shallow = tiny_checkpoint(tmp_path / "shallow", num_hidden_layers=1)
    result = spqt("generate", run_path(shallow, tmp_path / "b"), "-p", "fox", "--adapter-path", lora)
    assert_error(result, 3, "does not fit the model", "model.layers.1", "not an adapter parameter")


def test_layers_that_the_model_has_not(converted, damaged):
    config = json.loads((damaged / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = ["self_attn.nosuch"]
    (damaged / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(damaged / "adapters.safetensors"), {})
    result = spqt("generate", converted, "-p", "fox", "--adapter-path", damaged)
    assert_error(result, 3, "names no layer of the model")


def test_a_file_that_lacks_some_layers(converted, damaged):
    shard = str(damaged / "adapters.safetensors")
    rest = {name: array for name, array in mx.load(shard).items() if "layers.1.mlp.up_proj" not in name}
    mx.save_safetensors(shard, rest)
    result = spqt("generate", converted, "-p", "fox", "--adapter-path", damaged)
    assert_error(result, 3, "lacks", "layers.1.mlp.up_proj.lora_a")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": "all"}, {"lora_parameters": None}, {"lora_parameters": {"rank": 0}},
        {"lora_parameters": {"rank": 4, "scale": "high", "dropout": 0.0}},
        {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 1.0}},
        {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": [1]}},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(converted, damaged, changes):
    config = json.loads((damaged / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps(config | changes))
    result = spqt("generate", converted, "-p", "fox", "--adapter-path", damaged)
    assert_error(result, 3, "needs num_layers, and rank, scale and dropout")


def test_an_unknown_kind_of_adapter(converted, damaged):
    (damaged / "adapter_config.json").write_text('{"fine_tune_type": "nosuch"}')
    assert_error(spqt("generate", converted, "-p", "x", "--adapter-path", damaged), 3, "nosuch", "lora, dora")


def test_a_damaged_file(converted, damaged):
    shard = damaged / "adapters.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_error(spqt("generate", converted, "-p", "x", "--adapter-path", damaged), 3, "safetensors")
    shard.unlink()
    assert_error(spqt("generate", converted, "-p", "x", "--adapter-path", damaged), 3, "is missing")


def test_generate_writes_what_the_library_writes(converted, lora):
    """`--adapter-path` against mlx-lm's own classes on the dequantized model."""
    loaded = session.load(converted, adapter_path=str(lora), dense=True)
    plain = dequantized_copy(session.load(converted, dense=True))
    load_adapters(plain, str(lora)).eval()
    ours = token_ids(loaded, 32)
    loaded.model = plain
    assert ours == token_ids(loaded, 32)
