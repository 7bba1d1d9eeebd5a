"""Hub ids against a local server: fetching, caching, offline mode, range reads, errors, uploads."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest

from tests.conftest import tiny_checkpoint
from tests.lib.converting import config_of, contents
from tests.lib.hub_server import COMMIT, Hub, serve

SECRET = Hub.token


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    running, server = serve({"org/tiny": checkpoint})
    yield running
    server.shutdown()
    server.server_close()


def spqt(
    hub: Hub, tmp_path: Path, *arguments: object, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command line with `hub` as its hub and a cache of its own."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": SECRET,
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-m", "spqt_cli", *map(str, arguments)],
        env=variables, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert SECRET not in done.stdout + done.stderr  # fault 69
    return done


def test_convert_a_hub_id_then_again_offline(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = spqt(hub, tmp_path, "convert", "org/tiny", "--revision", "v1", "--q-group-size", 32)
    assert done.returncode == 0, done.stderr
    first = contents(tmp_path / "tiny-spqt-4bit")
    config = json.loads(first["config.json"])
    assert config["spqt"]["source"]["name"] == "org/tiny"
    assert config["spqt"]["source"]["revision"] == COMMIT
    assert 'base_model: "org/tiny"' in first["README.md"].decode()
    log = len(hub.log)
    options = ("--revision", "v1", "--q-group-size", 32, "-o", "again")
    done = spqt(hub, tmp_path, "convert", "org/tiny", *options, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(hub.log) == log
    assert contents(tmp_path / "again") == first


def test_fault_25_unsupported_is_refused_after_config_json_alone(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/odd"] = tiny_checkpoint(tmp_path / "odd")
    config_of(tmp_path / "odd", model_type="no_such_model")
    done = spqt(hub, tmp_path, "convert", "org/odd")
    assert done.returncode == 4
    assert "no_such_model" in done.stderr
    assert {path.rpartition("/")[2] for method, path, _, _ in hub.log if "/resolve/" in path} == {
        "config.json"
    }


def test_dry_run_reads_headers_alone(hub: Hub, tmp_path: Path) -> None:
    large = tiny_checkpoint(tmp_path / "large", hidden_size=256, intermediate_size=1024)
    hub.repos["org/large"] = large
    done = spqt(hub, tmp_path, "convert", "org/large", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert hub.sent("model.safetensors") <= 100_001 < (large / "model.safetensors").stat().st_size / 10
    assert all(wanted for method, path, wanted, _ in hub.log
               if method == "GET" and path.endswith(".safetensors"))  # fmt: skip
    done = spqt(hub, tmp_path, "convert", large, "-o", "out", "--json")
    assert planned["bytes"] == json.loads(done.stdout)["bytes"]
    assert planned["layers"] == 14


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("org/nothing", "neither a path here nor a model on the hub"),
        ("gated/model", "gated"),
        ("org/tiny --revision v9", "no such revision"),
    ],
)
def test_hub_says_no(hub: Hub, tmp_path: Path, repo: str, words: str) -> None:
    done = spqt(hub, tmp_path, "convert", *repo.split())
    assert done.returncode == 3
    assert words in done.stderr
    assert "hint:" in done.stderr


def test_offline_without_a_copy(hub: Hub, tmp_path: Path) -> None:
    done = spqt(hub, tmp_path, "convert", "org/tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 3
    assert "offline mode is on" in done.stderr
    assert not hub.log


def test_hub_can_not_be_reached(hub: Hub, tmp_path: Path) -> None:
    done = spqt(hub, tmp_path, "convert", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 3
    assert "can't be reached" in done.stderr


def test_fault_18_only_pickles_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.repos["org/pickled"] = folder
    done = spqt(hub, tmp_path, "convert", "org/pickled")
    assert done.returncode == 4
    assert hub.sent("pytorch_model.bin") == 0


def test_fault_63_line_goes_dead_then_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.drop["model.safetensors"] = 1000
    done = spqt(hub, tmp_path, "convert", "org/tiny", "-o", "out", "--q-group-size", 32)
    if done.returncode:  # huggingface_hub may try again by itself
        assert done.returncode == 3
        assert "run again" in done.stderr or "connect" in done.stderr
        assert not (tmp_path / "out").exists()
        done = spqt(hub, tmp_path, "convert", "org/tiny", "-o", "out", "--q-group-size", 32)
    assert done.returncode == 0, done.stderr
    assert hub.drop == {}


def test_converted_model_on_the_hub(hub: Hub, tmp_path: Path, converted: Path) -> None:
    hub.repos["org/converted"] = converted
    done = spqt(hub, tmp_path, "inspect", "org/converted")
    assert done.returncode == 0, done.stderr
    assert "14 Zigzag layers" in done.stdout
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in converted.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    hub.repos["org/damaged"] = damaged
    done = spqt(hub, tmp_path, "inspect", "org/damaged")  # a download is verified once
    assert done.returncode == 3
    assert "SHA-256" in done.stderr


def test_a_converted_model_runs_by_its_hub_id(hub: Hub, tmp_path: Path, calibrated: Path) -> None:
    hub.repos["org/calibrated"] = calibrated
    done = spqt(hub, tmp_path, "run", "org/calibrated", "the fox", "-m", 4, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["generation_tokens"] == 4
    assert found["sparsity"] > 0.2


def test_what_calibrate_uploads_has_thresholds_and_a_card_that_the_hub_reads(
    hub: Hub, tmp_path: Path, converted: Path
) -> None:
    shutil.copytree(converted, tmp_path / "m")
    flags = ("--sparsity", 0.3, "--tokens", 1024, "--method", "fast", "--upload-repo", "me/thresholds")
    done = spqt(hub, tmp_path, "calibrate", "m", *flags)
    assert done.returncode == 0, done.stderr
    sent = hub.uploads["me/thresholds"]
    assert json.loads(sent["config.json"])["spqt"]["calibration"]["sparsity"] == 0.3
    assert not [name for name in sent if name.startswith(".") or name.endswith(".py")]
    card = huggingface_hub.ModelCard(sent["README.md"].decode())
    assert card.data.library_name == "mlx"
    assert card.data.tags == ["mlx", "spqt", "4-bit"]
    assert "Calibrated to skip 30%" in card.content


def test_upload(hub: Hub, tmp_path: Path, checkpoint: Path) -> None:
    done = spqt(hub, tmp_path, "convert", checkpoint, "-o", "out", "--upload-repo", "me/mine")
    assert done.returncode == 0, done.stderr
    assert "uploaded to me/mine\n" in done.stderr
    assert hub.uploads["me/mine"].keys() >= {
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
    }
    assert mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert hub.uploads["me/mine"]["config.json"] == (tmp_path / "out" / "config.json").read_bytes()


def test_upload_fails_after_the_work(hub: Hub, tmp_path: Path, checkpoint: Path) -> None:
    done = spqt(hub, tmp_path, "convert", checkpoint, "-o", "out", "--upload-repo", "me/broken")
    assert done.returncode == 3
    assert "the converted folder is complete" in done.stderr
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("repo", "token"), [("me/mine", "hf_wrong"), ("me/mine", ""), ("no/such/name", SECRET)], ids=str
)
def test_upload_that_must_fail_is_refused_before_the_work(
    hub: Hub, tmp_path: Path, checkpoint: Path, repo: str, token: str
) -> None:
    done = spqt(hub, tmp_path, "convert", checkpoint, "-o", "out", "--upload-repo", repo, HF_TOKEN=token)
    assert done.returncode == 3
    assert "hint:" in done.stderr
    assert not (tmp_path / "out").exists()
