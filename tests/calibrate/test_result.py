"""What a calibration says of itself: the default share, the warning, what config.json keeps of it."""

import dataclasses
import shutil

import pytest

from spqt_cli.calibrate import calibrate
from spqt_cli.cli import describe
from spqt_cli.decode import layers, quality_warning, session
from spqt_cli.format.folder import Folder


@pytest.mark.parametrize(
    ("weights", "share"),
    [(135e6, 0.25), (494e6, 0.25), (0.5e9, 0.3), (1.24e9, 0.3), (1.54e9, 0.4), (8e9, 0.4), (70e9, 0.4)],
)
def test_default_share_grows_with_the_model_and_never_to_half(weights, share):
    assert calibrate.default_sparsity(int(weights)) == share


def test_size_counts_embedding_and_head(converted, tmp_path, monkeypatch):
    """A model of 1.5B weights has 1.3B in its blocks; by those alone it would count as smaller."""
    folder = shutil.copytree(converted, tmp_path / "model")
    loaded = session.load(folder, dense=True)
    blocks = sum(layer.inputs * layer.outputs for layer in layers.zigzag_layers(loaded.model).values())
    seen = []
    monkeypatch.setattr(calibrate, "default_sparsity", lambda weights: seen.append(weights) or 0.25)
    options = calibrate.CalibrateOptions(tokens=128, window=64, method="uniform")
    assert calibrate.calibrate(folder, options, lambda *_: None).sparsity == 0.25
    assert seen[0] >= blocks + 512 * 64  # the tied embedding


def test_limit_is_met_and_one_step_over_it_warns():
    assert quality_warning.warning(quality_warning.SUFFERS) == ""
    assert "perplexity about +28%" in quality_warning.warning(0.25)  # exp(0.25) = 1.284
    assert quality_warning.warning(1e300)  # no overflow


@pytest.fixture
def poor(calibrated):
    """A calibration, at 40 %, that came out at a KL of 0.25."""
    found = Folder(calibrated).calibration
    assert found.kl == pytest.approx(found.record["tried"][0]["kl"], rel=1e-5)
    return dataclasses.replace(found, kl=0.25)


def test_warned_of_the_calibrated_share_and_above(poor):
    shown = {share: quality_warning.warning_of(poor, share) for share in (None, 0.2, 0.4, 0.6)}
    assert [share for share, said in shown.items() if said] == [0.4, 0.6]
    assert shown[0.4] == quality_warning.warning(0.25)
    assert "0.25 at the calibrated 40%, and more at 60%" in shown[0.6]
    assert "perplexity" not in shown[0.6]  # which was measured at 40 %


def test_no_calibration_or_no_recorded_kl_warns_of_nothing(poor):
    assert quality_warning.warning_of(dataclasses.replace(poor, kl=None), 0.4) == ""
    assert quality_warning.warning_of(None, 0.4) == ""


def test_inspect_shows_cost_and_warning(calibrated):
    summary = describe.describe(str(calibrated))
    kl = summary.calibration["kl"]
    realised, tokens = (summary.calibration[key] for key in ("realised", "tokens"))
    assert (
        f"for 40% sparsity, {realised:.1%} of the Zigzag weights skipped on held-out text, KL to dense "
        f"{kl:.3f} nats per token, thresholds from {tokens} tokens\n"
    ) in summary.text()
    odd = {"method": ["x"], "sparsity": 0.4, "realised": "much", "tokens": 10**400}
    said = dataclasses.replace(summary, calibration=odd).text()
    assert f"for 40% sparsity, realised much, tokens {10**400}\n" in said
    bad = dataclasses.replace(summary, calibration={**summary.calibration, "kl": 0.25})
    assert "warning: the text will suffer" in bad.text()
