"""config.json of a converted model: what was edited, foreign or damaged is refused by name."""

import copy
import math

import pytest

from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import contract
from spqt_cli.format.config_json import read_config


@pytest.fixture
def config(calibrated):
    return copy.deepcopy(read_config(calibrated))


def first_entry(config) -> dict:
    return next(iter(contract.entries(config).values()))


def refused(config, calibrated, match: str) -> SpqtError:
    with pytest.raises(SpqtError, match=match) as caught:
        contract.check(config, calibrated)
    return caught.value


def test_a_calibrated_config_passes(config, calibrated):
    contract.check(config, calibrated)


@pytest.mark.parametrize("version", [contract.FORMAT_VERSION + 1, 99])
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


def test_the_fingerprint_ignores_thresholds_alone(config):
    before = contract.settings_fingerprint(config)
    first_entry(config)["spqt"]["threshold"] = 9.0
    assert contract.settings_fingerprint(config) == before
    first_entry(config)["bits"] = 8
    assert contract.settings_fingerprint(config) != before
