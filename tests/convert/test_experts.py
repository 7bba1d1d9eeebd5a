"""Experts of a mixture through convert: what is written, resumed, verified, refused, and what stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.cli import describe
from spqt_cli.convert import convert
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from spqt_cli.format import config_json, layout
from spqt_cli.format.folder import Folder
from tests.cli.test_commands import spqt
from tests.convert.test_quantized_sources import gpt_oss, logits
from tests.lib.converting import OPTIONS, contents, interrupted, leftovers, run
from tests.lib.mixture import PROJECTIONS, tiny_mixture

BY_ROWS = convert.ConvertOptions(group_size=32, skip=tuple(path.rpartition(".")[2] for path in PROJECTIONS))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixture(tmp_path_factory.mktemp("mixture") / "source")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "out"
    convert.convert(str(source), output, OPTIONS)
    return output


def tensors(folder: Path) -> dict[str, mx.array]:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


def test_each_expert_is_the_zigzag_matrix_of_its_own_weights(source: Path, folder: Path) -> None:
    stored, plain = tensors(folder), tensors(source)
    for path in PROJECTIONS:
        entry = config_json.read_config(folder)["quantization"][path]
        assert entry["mode"] == "zigzag"
        assert entry["spqt"]["experts"] == 4
        for expert, w in enumerate(plain[f"{path}.weight"]):
            alone = layout.quantize(w, 4, 32, entry["spqt"]["band"])
            for name, part in zip(("weight", "scales", "biases"), alone, strict=True):
                assert mx.array_equal(stored[f"{path}.{name}"][expert], part)


def test_the_folder_is_of_version_2_and_verifies(folder: Path) -> None:
    checked = Folder(folder)
    assert checked.config["spqt"]["format_version"] == 2
    assert {checked.layers[path].experts for path in PROJECTIONS} == {4}
    assert checked.layers["model.layers.1.self_attn.q_proj"].experts is None
    assert checked.verify() == ["model.safetensors"]


def test_an_interrupted_conversion_goes_on_byte_for_byte(source: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupted(source, output, 22)
    assert convert.convert(str(source), output, OPTIONS).resumed == 22
    assert contents(output) == contents(folder)
    assert leftovers(tmp_path) == []


def edited(folder: Path, tmp_path: Path, **spqt: Any) -> Path:
    """A copy in which a layer's entry says something else; with the right fingerprint all the same."""
    from spqt_cli.format import contract

    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copied / "config.json").read_text())
    config["quantization"][PROJECTIONS[0]]["spqt"] |= spqt
    config["spqt"]["fingerprint"] = contract.settings_fingerprint(config)
    (copied / "config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize("experts", [0, -4, "4", 4.0, True, None])
def test_a_number_of_experts_that_is_none_is_refused(folder: Path, tmp_path: Path, experts: Any) -> None:
    with pytest.raises(SpqtError, match="experts"):
        Folder(edited(folder, tmp_path, experts=experts))


def test_another_number_of_experts_belongs_to_another_conversion(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpqtError, match="another conversion"):
        Folder(edited(folder, tmp_path, experts=3))


def test_a_folder_with_row_grouped_experts_loads_and_is_of_version_1(source: Path, tmp_path: Path) -> None:
    """As spqt wrote all of them before experts became Zigzag."""
    run(source, tmp_path / "rows", BY_ROWS)
    assert Folder(tmp_path / "rows").config["spqt"]["format_version"] == 1
    loaded = session.load(tmp_path / "rows")
    by_rows = logits(loaded.model)
    assert type(loaded.model.layers[1].mlp.switch_mlp.up_proj).__name__ == "QuantizedSwitchLinear"
    assert np.isfinite(by_rows).all()
    reasons = {one.modules: one.reason for one in describe.describe(str(tmp_path / "rows")).reads.left_out}
    assert "experts stay row-grouped" in reasons["model.layers.*.mlp.switch_mlp.up_proj"]


def test_more_of_what_a_token_reads_is_zigzag_than_row_grouped(source: Path, folder: Path) -> None:
    ours = describe.describe(str(folder)).reads
    theirs = convert.convert(str(source), folder.parent / "rows", BY_ROWS).reads
    assert ours.bytes == pytest.approx(theirs.bytes, rel=0.05)
    assert ours.skippable > theirs.skippable + 0.1


# --- experts that the source has in 4-bit floats

ZIGZAG = convert.ConvertOptions(group_size=32, zigzag_experts=True)


def test_experts_in_mxfp4_become_zigzag_on_demand_and_it_is_said(tmp_path: Path) -> None:
    folder, _ = gpt_oss(tmp_path)
    run(folder, tmp_path / "kept")
    result = convert.convert(str(folder), tmp_path / "zigzag", ZIGZAG)
    assert any("rounded once more" in line for line in result.warnings)
    entries = config_json.read_config(tmp_path / "zigzag")["quantization"]
    assert entries["model.layers.0.mlp.experts.up_proj"]["mode"] == "zigzag"
    kept, found = (logits(session.load(tmp_path / name).model) for name in ("kept", "zigzag"))
    off = np.linalg.norm(found - kept) / np.linalg.norm(kept)
    assert 0 < off < 0.5  # the rounding of random weights to 4 bits, through two layers
    shares = {name: describe.describe(str(tmp_path / name)).reads.skippable for name in ("kept", "zigzag")}
    assert shares["zigzag"] > shares["kept"] + 0.1


def test_the_command_asks_for_them_by_a_flag(tmp_path: Path) -> None:
    folder, _ = gpt_oss(tmp_path)
    for flags, kind in (((), b"kept"), (("--zigzag-experts",), b"zigzag")):
        shown = spqt("convert", str(folder), "--q-group-size", "32", "--dry-run", *flags).stdout
        (line,) = [one for one in shown.splitlines() if b"mlp.experts.up_proj " in one]
        assert kind in line
