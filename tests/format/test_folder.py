"""Parts of a converted folder that do not belong together are refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.convert import convert
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import config_json, identity
from tests.conftest import tiny_checkpoint
from tests.lib.converting import OPTIONS

SHARD = "model.safetensors"


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A writable copy of the converted model."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path, check: Callable[[Path], Any] = identity.check_model) -> SpqtError:
    with pytest.raises(SpqtError) as caught:
        check(folder)
    return caught.value


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_intact(folder: Path) -> None:
    assert identity.check_model(folder)["spqt"]["content"]
    assert identity.verify(folder) == [SHARD]


def test_fault_12_stale_shard(folder: Path) -> None:
    mx.save_safetensors(str(folder / "model-old.safetensors"), {"a": mx.zeros(4)})
    assert "model-old.safetensors" in refusal(folder).cause


def test_fault_28_newer_format(folder: Path) -> None:
    edit(folder, lambda config: config["spqt"].update(format_version=config_json.FORMAT_VERSION + 1))
    error = refusal(folder)
    assert isinstance(error, UnsupportedError)
    assert "upgrade" in error.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization"]["model.layers.0.mlp.up_proj"].update(bits=8),
        lambda c: c["quantization"]["model.layers.0.mlp.up_proj"].update(group_size=64),
        lambda c: c["quantization"]["model.layers.0.mlp.up_proj"]["spqt"].update(band=32),
        lambda c: c["quantization"].pop("model.layers.0.mlp.up_proj"),
        lambda c: c["quantization"]["model.layers.0.mlp.up_proj"].update(mode="affine"),
        lambda c: c["quantization"]["model.embed_tokens"].update(bits=3),
        lambda c: c["quantization"].update({"model.embed_tokens": False}),
        lambda c: c["quantization"].update(bits=3),
    ],
)
def test_fault_30_edited_settings(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(folder, change)
    assert refusal(folder).exit_code == 3


def test_fault_30_edited_settings_and_fingerprint(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization"]["model.layers.0.mlp.up_proj"]["bits"] = 8
        config["spqt"]["fingerprint"] = config_json.fingerprint(config)

    edit(folder, change)
    assert SHARD in refusal(folder).cause


def test_fault_31_damaged_weights(folder: Path) -> None:
    flip_a_bit(folder / SHARD)
    identity.check_model(folder)  # headers alone can't know
    assert SHARD in refusal(folder, identity.verify).cause


def test_shard_of_another_conversion_with_the_same_settings(folder: Path, tmp_path: Path) -> None:
    convert.convert(str(tiny_checkpoint(tmp_path / "other", seed=1)), tmp_path / "foreign", OPTIONS)
    shutil.copy(tmp_path / "foreign" / SHARD, folder / SHARD)
    assert "another conversion" in refusal(folder).cause


def test_config_of_another_conversion(folder: Path, tmp_path: Path) -> None:
    convert.convert(str(tiny_checkpoint(tmp_path / "other", seed=1)), tmp_path / "foreign", OPTIONS)
    shutil.copy(tmp_path / "foreign" / "config.json", folder / "config.json")
    assert "another conversion" in refusal(folder).cause


def test_shard_without_our_metadata(folder: Path) -> None:
    mx.save_safetensors(str(folder / SHARD), mx.load(str(folder / SHARD)), {"format": "mlx"})
    assert SHARD in refusal(folder).cause


@pytest.mark.parametrize("lost", [1, 50_000])
def test_truncated_shard(folder: Path, lost: int) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - lost)
    assert SHARD in refusal(folder).cause


def test_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    assert SHARD in refusal(folder).cause


def test_missing_index_of_one_shard_is_no_fault(folder: Path) -> None:
    (folder / config_json.INDEX).unlink()
    assert identity.check_model(folder)


def test_layer_without_its_scales(folder: Path) -> None:
    path = "model.layers.0.mlp.up_proj"
    metadata = identity.checks.read_shard(folder / SHARD, SHARD)[1]
    weights = mx.load(str(folder / SHARD))
    weights.pop(f"{path}.scales")
    mx.save_safetensors(str(folder / SHARD), weights, metadata)
    (folder / config_json.INDEX).unlink()
    assert path in refusal(folder).cause


def test_layer_of_another_shape(folder: Path) -> None:
    path = "model.layers.0.mlp.up_proj"
    metadata = identity.checks.read_shard(folder / SHARD, SHARD)[1]
    weights = mx.load(str(folder / SHARD))
    weights[f"{path}.scales"] = weights[f"{path}.scales"][:, :-1]
    mx.save_safetensors(str(folder / SHARD), weights, metadata)
    assert path in refusal(folder).cause


@pytest.mark.parametrize("recorded", [None, {}, [], 3, {"../x.safetensors": "0"}, {"/x.safetensors": "0"}])
def test_recorded_shards_are_damaged(folder: Path, recorded: Any) -> None:
    edit(folder, lambda config: config["spqt"].update(shards=recorded))
    assert refusal(folder).exit_code == 3


def test_fault_65_code_in_a_converted_folder(folder: Path) -> None:
    edit(folder, lambda config: config.update(model_file="evil.py"))
    assert isinstance(refusal(folder), UnsupportedError)
    identity.check_model(folder, trust_remote_code=True)


def test_not_converted(checkpoint: Path) -> None:
    assert "not a converted model" in refusal(checkpoint).cause


def test_thresholds_leave_the_identity_alone(calibrated: Path) -> None:
    assert identity.verify(calibrated) == [SHARD]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", ".spqt-calibration.npz"])
def test_pipe_in_the_folder(folder: Path, name: str) -> None:
    """transformers and NumPy would wait for somebody to write into it."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "is no file" in refusal(folder).cause
