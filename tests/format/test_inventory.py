"""What `spqt list` finds: converted folders, here, below and in the hub's cache, damaged or not."""

import shutil
from pathlib import Path

import pytest

from spqt_cli.errors import SpqtError
from spqt_cli.format import inventory


def test_folders_and_what_they_hold(calibrated: Path, converted: Path, checkpoint: Path, tmp_path: Path):
    for name, folder in (("b", calibrated), ("a", converted), ("source", checkpoint)):
        shutil.copytree(folder, tmp_path / name)
    plain, skipping = inventory.find([tmp_path])
    assert (Path(plain.name).name, Path(skipping.name).name) == ("a", "b")
    assert (plain.sparsity, plain.kl) == (None, None)
    assert skipping.sparsity == 0.4
    assert skipping.kl is not None
    assert (skipping.bits, skipping.group_size) == (4, 32)
    assert skipping.size_bytes == sum(path.stat().st_size for path in calibrated.glob("*.safetensors"))


def test_a_folder_that_is_named_itself_is_listed_once(calibrated: Path):
    assert [one.name for one in inventory.find([calibrated, calibrated.parent])] == [str(calibrated)]


def test_a_damaged_folder_is_listed_with_its_fault(converted: Path, tmp_path: Path):
    shutil.copytree(converted, tmp_path / "lost")
    next((tmp_path / "lost").glob("*.safetensors")).unlink()
    shutil.copytree(converted, tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    lost, torn = inventory.find([tmp_path])
    assert "model.safetensors" in lost.fault
    assert "config.json" in torn.fault
    assert (lost.bits, torn.bits) == (None, None)


def test_places_that_are_no_folders(tmp_path: Path):
    with pytest.raises(SpqtError, match="no folder"):
        inventory.find([tmp_path / "gone"])


def test_the_hub_cache_lists_the_newest_revision_by_id(
    calibrated: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert inventory.in_hub_cache() == []
    repo = tmp_path / "models--org--tiny"
    for name, folder in (("0" * 40, converted), ("1" * 40, calibrated)):
        (repo / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot = repo / "snapshots" / name
        snapshot.mkdir(parents=True)
        for path in folder.iterdir():
            blob = repo / "blobs" / f"{name}-{path.name}"
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1" * 40)
    (found,) = inventory.in_hub_cache()
    assert (found.name, found.sparsity) == ("org/tiny", 0.4)
