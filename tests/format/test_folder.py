"""Parts of a converted folder that do not belong together are refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.bench import models
from spqt_cli.calibrate import calibrate
from spqt_cli.calibrate.calibrate import CalibrateOptions
from spqt_cli.cli import describe
from spqt_cli.convert import convert
from spqt_cli.decode import session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.evaluate import compare
from spqt_cli.format import checkpoint_files, config_json, contract
from spqt_cli.format.contract import ThresholdsError
from spqt_cli.format.folder import Folder, remove_thresholds
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


def refusal(folder: Path, check: Callable[[Path], Any] = Folder) -> SpqtError:
    with pytest.raises(SpqtError) as caught:
        check(folder)
    return caught.value


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_intact(folder: Path) -> None:
    assert Folder(folder).layers["model.layers.0.mlp.up_proj"].bits == 4
    assert Folder(folder).verify() == [SHARD]


def test_fault_12_stale_shard(folder: Path) -> None:
    mx.save_safetensors(str(folder / "model-old.safetensors"), {"a": mx.zeros(4)})
    assert "model-old.safetensors" in refusal(folder).cause


def test_fault_28_newer_format(folder: Path) -> None:
    edit(folder, lambda config: config["spqt"].update(format_version=contract.FORMAT_VERSION + 1))
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
        config["spqt"]["fingerprint"] = contract.settings_fingerprint(config)

    edit(folder, change)
    assert SHARD in refusal(folder).cause


def test_fault_31_damaged_weights(folder: Path) -> None:
    flip_a_bit(folder / SHARD)
    Folder(folder)  # headers alone can't know
    assert SHARD in refusal(folder, lambda path: Folder(path).verify()).cause


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
    assert Folder(folder).shards.keys() == {SHARD}


def test_layer_without_its_scales(folder: Path) -> None:
    path = "model.layers.0.mlp.up_proj"
    metadata = checkpoint_files.read_shard(folder / SHARD, SHARD)[1]
    weights = mx.load(str(folder / SHARD))
    weights.pop(f"{path}.scales")
    mx.save_safetensors(str(folder / SHARD), weights, metadata)
    (folder / config_json.INDEX).unlink()
    assert path in refusal(folder).cause


def test_layer_of_another_shape(folder: Path) -> None:
    path = "model.layers.0.mlp.up_proj"
    metadata = checkpoint_files.read_shard(folder / SHARD, SHARD)[1]
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
    Folder(folder, trust_remote_code=True)


def test_not_converted(checkpoint: Path) -> None:
    assert "not a converted model" in refusal(checkpoint).cause


def test_thresholds_leave_the_identity_alone(calibrated: Path) -> None:
    assert Folder(calibrated).verify() == [SHARD]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", ".spqt-calibration.npz"])
def test_pipe_in_the_folder(folder: Path, name: str) -> None:
    """transformers and NumPy would wait for somebody to write into it."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "is no file" in refusal(folder).cause


def test_bad_thresholds_are_told_apart_from_all_else(calibrated: Path, tmp_path: Path) -> None:
    """Calibration may remove what is wrong then; where settings are wrong too, it may not."""
    folder = Path(shutil.copytree(calibrated, tmp_path / "model"))
    entry = "model.layers.0.mlp.up_proj"
    edit(folder, lambda config: config["quantization"][entry]["spqt"].update(threshold=-1))
    assert isinstance(refusal(folder), ThresholdsError)
    edit(folder, lambda config: config["quantization"][entry].update(bits=8))
    assert not isinstance(refusal(folder), ThresholdsError)


def test_thresholds_at_the_calibrated_and_at_another_sparsity(calibrated: Path, converted: Path) -> None:
    folder = Folder(calibrated)
    assert folder.calibration is not None
    at = folder.calibration.sparsity
    assert folder.thresholds(at) == {path: layer.threshold for path, layer in folder.layers.items()}
    assert folder.thresholds(0.2) == {path: layer.curve[10] for path, layer in folder.layers.items()}
    with pytest.raises(SpqtError, match="no thresholds to derive"):
        Folder(converted).thresholds(0.2)
    assert set(Folder(converted).thresholds(0).values()) == {0.0}


def test_written_thresholds_are_read_back(folder: Path) -> None:
    unchanged = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    curve = [i / 100 for i in range(50)]
    opened = Folder(folder)
    opened.write_calibration(
        dict.fromkeys(opened.layers, (0.125, curve)), {"sparsity": 0.25, "method": "uniform"}
    )
    read = Folder(folder)
    assert {(layer.threshold, layer.curve) for layer in read.layers.values()} == {(0.125, tuple(curve))}
    assert read.calibration is not None
    assert (read.calibration.sparsity, read.calibration.kl) == (0.25, None)
    assert opened.calibration is None
    remove_thresholds(folder)
    assert Folder(folder).config == opened.config
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in unchanged} == unchanged


@pytest.mark.parametrize(
    "use",
    [
        session.load,
        lambda folder: describe.describe(str(folder)),
        lambda folder: Folder(folder).verify(),
        lambda folder: models.lazy_model(str(folder)),
        lambda folder: calibrate.calibrate(
            folder, CalibrateOptions(sparsity=0.3, tokens=128, window=64, method="uniform"), lambda *_: None
        ),
        lambda folder: compare.compare(
            str(folder), Prompt("fox", ignore_chat_template=True), [0, 0.4], compare.Effort(1)
        ),
    ],
    ids=["load", "inspect", "verify", "bench", "calibrate", "compare"],
)
def test_every_header_is_parsed_once(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object]
) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "model"))
    parsed = []
    library, own = checkpoint_files.safe_open, checkpoint_files._dtypes

    def opens(path: Path, **options: Any) -> Any:
        parsed.append(Path(path).name)
        return library(path, **options)

    def parses(path: Path, text: bytes) -> dict[str, str]:
        parsed.append(path.name)
        return own(path, text)

    monkeypatch.setattr(checkpoint_files, "safe_open", opens)
    monkeypatch.setattr(checkpoint_files, "_dtypes", parses)
    use(folder)
    assert parsed == [SHARD]
