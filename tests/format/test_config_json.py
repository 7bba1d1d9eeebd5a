"""config.json as the contract: what was edited, foreign or damaged is refused by name."""

import copy
import json
import math
import os

import pytest

from spqt_cli.errors import ResourceError, SpqtError, UnsupportedError
from spqt_cli.format import config_json


@pytest.fixture
def config(calibrated):
    return copy.deepcopy(config_json.read_config(calibrated))


def first_entry(config) -> dict:
    return next(iter(config_json.entries(config).values()))


def refused(config, calibrated, match: str) -> SpqtError:
    with pytest.raises(SpqtError, match=match) as caught:
        config_json.check(config, calibrated)
    return caught.value


def test_a_calibrated_config_passes(config, calibrated):
    config_json.check(config, calibrated)


@pytest.mark.parametrize("version", [2, 99])
def test_fault_28_newer_format_asks_for_an_upgrade(config, calibrated, version):
    config["spqt"]["format_version"] = version
    assert isinstance(refused(config, calibrated, "format"), UnsupportedError)


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.0])
def test_fault_29_versions_that_never_were(config, calibrated, version):
    """Format 1 is the first: there is no older one to migrate."""
    config["spqt"]["format_version"] = version
    assert "convert" in refused(config, calibrated, "version").hint


def test_fault_30_edited_settings(config, calibrated):
    first_entry(config)["spqt"]["band"] += first_entry(config)["group_size"]
    refused(config, calibrated, "edited")


def test_fault_32_thresholds_of_another_model(config, calibrated):
    config["spqt"]["shards"] = dict.fromkeys(config["spqt"]["shards"], "0" * 64)
    refused(config, calibrated, "another model")


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, "0.1", None, True])
def test_fault_33_bad_thresholds(config, calibrated, value):
    first_entry(config)["spqt"]["threshold"] = value
    refused(config, calibrated, "threshold")


def test_fault_33_a_layer_without_threshold(config, calibrated):
    del first_entry(config)["spqt"]["threshold"]
    refused(config, calibrated, "13 of 14 layers")


def test_thresholds_without_a_calibration_section(config, calibrated):
    del config["spqt"]["calibration"]
    refused(config, calibrated, "another model")


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "0.1", None, True])
def test_fault_33_a_kl_that_is_no_number(config, calibrated, value):
    config["spqt"]["calibration"]["kl"] = value
    refused(config, calibrated, "KL of")


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [None, 7, "4", -64, 10**30, True, 4.0])
def test_damaged_entries(config, calibrated, key, value):
    first_entry(config)[key] = value
    refused(config, calibrated, "layer model")


@pytest.mark.parametrize(
    "spqt", [None, [], {"band": 64, "extra": 1}, {"band": 0}, {"band": -64}, {"band": 33}]
)
def test_damaged_sections_of_an_entry(config, calibrated, spqt):
    first_entry(config)["spqt"] = spqt
    refused(config, calibrated, "layer model")


def test_what_is_no_model_folder(tmp_path):
    (tmp_path / "file").touch()
    for name, cause in (("nowhere", "is not found"), ("file", "is no folder"), ("", r"has no config\.json")):
        with pytest.raises(SpqtError, match=cause):
            config_json.read_config(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' * 100000, "\ud800"])
def test_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpqtError, match=r"config\.json"):
        config_json.read_config(tmp_path)


def test_the_fingerprint_ignores_thresholds_alone(config):
    before = config_json.fingerprint(config)
    first_entry(config)["spqt"]["threshold"] = 9.0
    assert config_json.fingerprint(config) == before
    first_entry(config)["bits"] = 8
    assert config_json.fingerprint(config) != before


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    config_json.write_config(tmp_path, {"a": 1})
    before = (tmp_path / "config.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="full"):
        config_json.write_config(tmp_path, {"a": 2})
    assert (tmp_path / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_quantization_is_mirrored_as_mlx_lm_writes_it(tmp_path):
    config_json.write_config(tmp_path, {"quantization": {"bits": 4}})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"] == written["quantization"]
