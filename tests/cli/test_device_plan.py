"""`spqt inspect --plan`: what it says of a tiny model, against sums by hand."""

import json

import pytest
from mlx.utils import tree_flatten

from spqt_cli.bench import chips
from spqt_cli.cli import device_plan
from spqt_cli.decode import session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.decode.session import weight_bytes
from spqt_cli.errors import UsageError
from tests.cli.test_commands import spqt
from tests.distributed import make

DEVICES = device_plan.Devices(2, gb_per_s=100.0, link_gb_per_s=1.0, latency_us=40.0)


def test_a_plan_is_what_is_stored_and_read(calibrated):
    found = device_plan.plan(str(calibrated), None, DEVICES)
    one, tensor, pipeline = found.ways
    loaded = session.load(calibrated, dense=True)
    other, zigzag = weight_bytes(loaded.model, loaded.config)
    zigzag_bytes = sum(zigzag.values())
    assert (found.sparsity, found.origin) == (0.4, "calibrated")
    assert one.stored_bytes == sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    assert one.read_bytes == pytest.approx(other + zigzag_bytes)
    assert one.sparse_read_bytes == pytest.approx(other + 0.6 * zigzag_bytes)
    assert one.rates[0] == pytest.approx(100e9 / one.read_bytes)
    # All Zigzag layers of a llama are divided, its tied embedding and norms are not.
    assert tensor.read_bytes == pytest.approx(other + zigzag_bytes / 2)
    assert tensor.messages == 2 * 2 * len(loaded.model.layers)  # o and down; two steps of a ring of two
    message = 40e-3 + 64 * 2 / 2 / 1e6  # ms: half of 64 numbers of two bytes at 1 GB/s
    assert tensor.message_ms == pytest.approx(tensor.messages * message)
    assert tensor.rates[0] == pytest.approx(1e3 / (tensor.read_bytes / 100e6 + tensor.message_ms))
    assert pipeline.reason == "mlx-lm has no pipeline for architecture llama"
    assert pipeline.rates == (0.0, 0.0)
    assert len(zigzag_layers(loaded.model)) == 14


def test_a_pipeline_holds_less_and_is_no_faster(tmp_path):
    folder = make("qwen3_moe", tmp_path, {})
    _, tensor, pipeline = device_plan.plan(str(folder), None, DEVICES).ways
    one = device_plan.plan(str(folder), None, DEVICES).ways[0]
    assert 0.5 * one.stored_bytes < pipeline.stored_bytes < 0.7 * one.stored_bytes
    assert pipeline.read_ms == pytest.approx(one.read_ms)
    assert pipeline.messages == 2
    assert 0.5 * one.stored_bytes < tensor.stored_bytes < 0.7 * one.stored_bytes
    assert tensor.messages == 2 * 2 * 4  # attention's o, and the experts' sum, of four layers


def test_numbers_that_are_none_are_refused(calibrated):
    assert device_plan.bandwidth("m4max") == chips.GB_PER_S["M4 Max"] == device_plan.bandwidth("546.1")
    for wrong in ("M9", "0", "nan", "-3"):
        with pytest.raises(UsageError, match="--bandwidth"):
            device_plan.bandwidth(wrong)
    for flag, devices in (
        ("--plan 1", DEVICES.__class__(1, 1, 1, 1)),
        ("--link 0", DEVICES.__class__(2, 1, 0, 1)),
        ("--latency nan", DEVICES.__class__(2, 1, 1, float("nan"))),
    ):
        with pytest.raises(UsageError, match=flag):
            device_plan.plan(str(calibrated), None, devices)


def test_it_says_that_it_calculates(calibrated):
    shown = spqt("inspect", calibrated, "--plan", 2)
    assert shown.returncode == 0, shown.stderr
    assert b"a calculation of reading and sending alone, nothing was measured" in shown.stdout
    assert b"pipeline, 2 devices      not possible: mlx-lm has no pipeline" in shown.stdout
    found = json.loads(spqt("inspect", calibrated, "--plan", 2, "--json").stdout)
    assert found["calculated"] is True
    assert [way["devices"] for way in found["ways"]] == [1, 2, 2]
