"""Exact zeros: found by calibrate, skipped at any sparsity, and nothing is lost by it."""

import io
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import select
from spqt_cli.calibrate import calibrate
from spqt_cli.calibrate import result as calibration
from spqt_cli.cli import describe
from spqt_cli.convert import convert
from spqt_cli.decode import active_counts, layers, phase, session
from spqt_cli.format import config_json, contract, thresholds
from tests.format.test_thresholds import counts_of
from tests.lib.architecture_check import _write_source

LOSSLESS = thresholds.LOSSLESS


@pytest.fixture(scope="module")
def converted_relu(tmp_path_factory) -> Path:
    """nemotron: down projections behind ReLU squared, half of whose inputs are exactly 0."""
    base = tmp_path_factory.mktemp("relu")
    _write_source("nemotron", base / "source")
    convert.convert(str(base / "source"), base / "model", convert.ConvertOptions(group_size=32))
    return base / "model"


def calibrated_at(folder: Path, to: Path, sparsity: float) -> tuple[Path, calibrate.Calibration]:
    copy = Path(shutil.copytree(folder, to))
    options = calibrate.CalibrateOptions(sparsity=sparsity, tokens=128, window=32, method="uniform")
    return copy, calibrate.calibrate(copy, options, lambda *_: None)


@pytest.fixture(scope="module")
def at_zero(converted_relu, tmp_path_factory):
    return calibrated_at(converted_relu, tmp_path_factory.mktemp("zero") / "model", 0.0)


def test_lossless_is_normal_in_float32_and_survives_the_config():
    assert np.float32(LOSSLESS) > np.finfo(np.float32).tiny
    assert float(f"{LOSSLESS:.6g}") == LOSSLESS
    smallest = (np.finfo(np.float16).smallest_subnormal, np.finfo(np.float32).tiny * 1.1)
    assert all(np.float32(value) >= np.float32(LOSSLESS) for value in smallest)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.04, 0.0), (0.3, LOSSLESS), (0.9, LOSSLESS)])
def test_zeros_are_counted_exactly(share, expected):
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[: int(1000 * share)] = 0
    counts = counts_of(values)
    assert thresholds.zeros(counts) == pytest.approx(share)
    assert thresholds.lossless(counts) == expected


def test_share_zero_finds_them_and_stores_them(at_zero):
    folder, result = at_zero
    rows = {row.path: row for row in result.layers}
    down = [path for path in rows if path.endswith("down_proj")]
    assert len(down) == 4
    for path, row in rows.items():
        assert row.threshold == (LOSSLESS if path in down else 0)
    # a product of normal values is negative half of the time
    assert all(0.35 < rows[path].zeros < 0.65 and 0.35 < rows[path].realised < 0.65 for path in down)
    assert result.tried[0].kl < 1e-6
    assert 0 < result.lossless == pytest.approx(result.realised, abs=0.05)
    contract.check(config_json.read_config(folder), folder)


def test_people_see_them_in_the_table_and_in_inspect(at_zero):
    folder, result = at_zero
    out = io.StringIO()
    calibrate.print_table(result, out)
    assert "exact zeros among the inputs of 4 layers are skipped without loss" in out.getvalue()
    assert "model.layers.0.mlp.down_proj" in out.getvalue()
    assert "exact zeros in 4 layers" in describe.describe(str(folder)).text()


def test_generate_skips_them_by_default_with_the_dense_logits(at_zero):
    folder, _ = at_zero
    loaded, dense = session.load(folder), session.load(folder, dense=True)
    tokens = mx.array([[7]])
    with active_counts.counting() as counter, phase.decoding():
        found = loaded.model(tokens)
    assert mx.allclose(found, dense.model(tokens), rtol=1e-5, atol=1e-5)
    skipped = [1 - density for _, density in counter.densities()]
    assert len(skipped) == 4
    assert min(skipped) > 0.2
    assert all(layer.threshold is None for layer in layers.zigzag_layers(dense.model).values())


def test_other_shares_of_the_curve_keep_them(at_zero):
    folder, _ = at_zero
    for sparsity in (0, 0.3):
        loaded = session.load(folder, sparsity=sparsity)
        for path, layer in layers.zigzag_layers(loaded.model).items():
            if path.endswith("down_proj"):
                assert layer.threshold.item() >= np.float32(LOSSLESS)
            elif sparsity == 0:
                assert layer.threshold is None


def test_layer_that_a_positive_share_leaves_dense_still_skips_zeros():
    from spqt_cli.calibrate.curves import curve
    from spqt_cli.calibrate.measurements import Candidate

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    counts = counts_of(np.where(values < 0, 0, values))
    candidate = Candidate("gradient", {"one": np.zeros(len(thresholds.CURVE_SPARSITIES))}, {"one": LOSSLESS})
    assert set(curve(candidate, "one", counts, 0.4)) == {LOSSLESS}


def test_kernel_skips_zeros_of_both_signs_and_no_normal_number():
    w = mx.random.normal((96, 64), key=mx.random.key(0))
    linear = layers.nn.Linear(64, 96, bias=False)
    linear.weight = w
    layer = layers.ZigzagLinear.from_linear(linear, 32, 4)
    layer.set_threshold(LOSSLESS)
    x = np.zeros((1, 64), np.float32)
    x[0, :8] = (-0.0, 0.0, 1e-45, 2e-38, -2e-38, 6e-8, 1.0, -3.0)
    ys, active = select.sparse_gemv(mx.array(x), [layer])
    assert active.item() == 5
    assert mx.allclose(ys[0], mx.array(x) @ layer.dequantized().T, rtol=1e-5, atol=1e-6)


def test_a_damaged_table_shows_no_zeros():
    for section in ({}, {"layers": []}, {"layers": {"a": 3, "b": {"zeros": "many"}}}):
        assert calibration.stored_zeros(section) == ""
