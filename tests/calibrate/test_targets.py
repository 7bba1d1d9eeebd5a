"""Goals other than a share: the least sparsity that is fast enough, what is refused, what stays written."""

import dataclasses
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.calibrate import calibrate, speed, targets
from spqt_cli.calibrate.calibrate import CalibrateOptions
from spqt_cli.decode import profile, relayout, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.format import config_json
from spqt_cli.measure import probes

OPTIONS = CalibrateOptions(tokens=512, window=64, method="uniform")
DENSE, FREE = 0.010, 0.002  # seconds a token takes dense, and of that what skipping can't save


def seconds(share: float) -> float:
    return FREE + (DENSE - FREE) * (1 - share)


class Line:
    """A machine whose time per token falls in a straight line with the share."""

    def __init__(self, *args) -> None:
        self.asked: list[float] = []

    def tokens_per_second(self, thresholds, share) -> float:
        assert (not thresholds) == (share == 0)
        self.asked.append(share)
        return 1 / seconds(share)


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def fast(folder: Path, wanted: float):
    options = dataclasses.replace(OPTIONS, min_tokens_per_second=wanted)
    return calibrate.calibrate(folder, options, lambda *_: None)


def test_speed_lowest_share_that_reaches_it(folder, monkeypatch):
    monkeypatch.setattr(speed, "Pace", Line)
    result = fast(folder, 1 / seconds(0.334))
    assert result.sparsity == 0.34  # the next whole percent
    assert result.tokens_per_second == pytest.approx(1 / seconds(0.34))
    assert result.realised == pytest.approx(0.34, abs=0.02)
    assert config_json.read_config(folder)["spqt"]["calibration"]["sparsity"] == 0.34


def test_speed_that_dense_decoding_has_skips_nothing(folder, monkeypatch):
    monkeypatch.setattr(speed, "Pace", Line)
    assert fast(folder, 99.0).sparsity == 0


def test_speed_out_of_reach_says_the_best_and_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(speed, "Pace", Line)
    before = (folder / "config.json").read_bytes()
    best = f"{1 / seconds(targets.HIGHEST):.1f} at 90%"
    with pytest.raises(SpqtError, match=best) as caught:
        fast(folder, 1000.0)
    assert caught.value.exit_code == 3
    assert (folder / "config.json").read_bytes() == before
    assert fast(folder, 99.0).sparsity == 0  # a second try is not taken for the first one's rest


def test_speed_lost_by_settling_takes_more_sparsity(folder, monkeypatch):
    class Slower(Line):
        """The settled thresholds skip less: the second time a share is measured it is slower."""

        def tokens_per_second(self, thresholds, share) -> float:
            again = share in self.asked
            return super().tokens_per_second(thresholds, share) * (0.99 if again else 1)

    monkeypatch.setattr(speed, "Pace", Slower)
    result = fast(folder, 1 / seconds(0.334))
    assert result.sparsity == pytest.approx(0.34 + targets.MORE)
    assert result.tokens_per_second >= 1 / seconds(0.334)


def test_targets_exclude_one_another(folder):
    goals = {"sparsity": 0.2, "max_kl": 0.1, "max_ppl_increase": 5.0, "min_tokens_per_second": 10.0}
    for name in list(goals)[:-1]:
        pair = {name: goals[name], "min_tokens_per_second": 10.0}
        with pytest.raises(UsageError, match="exclude"):
            calibrate.calibrate(folder, dataclasses.replace(OPTIONS, **pair), lambda *_: None)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="positive"):
            fast(folder, bad)


@pytest.mark.parametrize("limit", [{"max_kl": 1e-9}, {"max_ppl_increase": 1e-9}])
def test_cost_that_can_not_be_met_writes_nothing(folder, limit):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(SpqtError, match="can't be met: skipping 2% already costs"):
        calibrate.calibrate(folder, dataclasses.replace(OPTIONS, **limit), lambda *_: None)
    assert (folder / "config.json").read_bytes() == before
    assert not list(folder.glob(".spqt*"))


def test_pace_runs_the_thresholds_and_the_profile_and_leaves_nothing(converted, monkeypatch):
    loaded = session.load(converted, dense=True)
    layers, head = zigzag_layers(loaded.model), relayout.find_head(loaded.model)
    one = "model.layers.0.mlp.down_proj"
    seen = []

    def taking(model, curves, sparsity) -> str:
        """A profile that takes a layer and the head out of the model."""
        seen.append((sparsity, layers[one].threshold.item(), layers["model.layers.1.mlp.up_proj"]))
        stock, _ = relayout.row_grouped(layers[one])
        model.layers[0].mlp.down_proj = stock
        relayout.head_to_zigzag(model, relayout.find_head(model))
        return ""

    monkeypatch.setattr(profile, "follow", taking)
    with probes.probing(loaded.model) as harness:
        tokens = np.random.default_rng(0).integers(5, 500, 64).astype(np.int32)
        rate = speed.Pace(loaded, harness, tokens).tokens_per_second({one: 0.25}, 0.5)
        assert isinstance(loaded.model.layers[0].mlp.down_proj, probes.Probe)
    assert rate > 0
    assert [(sparsity, value, other.threshold) for sparsity, value, other in seen] == [(0.5, 0.25, None)]
    assert zigzag_layers(loaded.model) == layers
    assert all(layer.threshold is None for layer in layers.values())
    assert relayout.find_head(loaded.model).module is head.module
    assert loaded.sparsity is None
    assert mx.isfinite(loaded.model(mx.array(tokens[None, :4]))).all()
