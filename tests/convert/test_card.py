"""The model card: what calibration and fit found goes between its marks, and what is not ours stays."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from spqt_cli.calibrate import calibrate
from spqt_cli.convert import card

OPTIONS = calibrate.CalibrateOptions(sparsity=0.3, tokens=1024, method="fast")


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    shutil.copytree(converted, tmp_path / "m")
    return tmp_path / "m"


def text(folder: Path) -> str:
    return (folder / card.NAME).read_text()


def test_a_calibration_comes_into_the_card_and_goes(folder: Path):
    before = text(folder)
    assert "Not calibrated" in before
    for wanted in ("pip install spqt", "spqt run MODEL", "spqt_cli.load"):
        assert wanted in before
    result = calibrate.calibrate(folder, OPTIONS, lambda *_: None)
    after = text(folder)
    assert "Not calibrated" not in after
    assert f"{result.realised:.1%} of the weights" in after
    assert f"{result.tried[0].kl:.3f} nats per token" in after
    calibrate.calibrate(folder, OPTIONS, lambda *_: None)
    assert text(folder) == after  # replaced, not added
    calibrate.remove(folder)
    assert text(folder) == before


def test_the_front_stays_yaml_with_tags_that_the_hub_knows(folder: Path):
    calibrate.calibrate(folder, OPTIONS, lambda *_: None)
    _, front, _ = text(folder).split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "mlx"
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["mlx", "spqt", "4-bit"]


@pytest.mark.parametrize("content", [b"my own words", b"\xff\xfe", card.BEGIN.encode(), None])
def test_a_card_of_somebody_else_stays(folder: Path, content: bytes | None):
    path = folder / card.NAME
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    calibrate.calibrate(folder, OPTIONS, lambda *_: None)
    assert (path.read_bytes() if path.exists() else None) == content


def test_a_link_into_the_hub_s_cache_is_replaced_not_written_through(folder: Path, tmp_path: Path):
    blob = tmp_path / "blob"
    os.replace(folder / card.NAME, blob)
    (folder / card.NAME).symlink_to(blob)
    before = blob.read_text()
    calibrate.calibrate(folder, OPTIONS, lambda *_: None)
    assert blob.read_text() == before
    assert "Calibrated to skip 30%" in text(folder)
