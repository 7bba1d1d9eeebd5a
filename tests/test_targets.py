"""Goals: a limit on KL or perplexity instead of a sparsity."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from spqt_cli import calibrate
from spqt_cli.calibrate import CalibrateOptions
from spqt_cli.errors import SpqtError, UsageError

OPTIONS = CalibrateOptions(sparsity=0.4, tokens=512, window=64, method="uniform")


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.mark.parametrize("limit", [{"max_kl": 0.05}, {"max_ppl_increase": 3.0}])
def test_goal_is_met_and_nearly_used_up(folder, limit):
    options = dataclasses.replace(OPTIONS, sparsity=None, **limit)
    result = calibrate.calibrate(folder, options, lambda *_: None)
    assert 0.02 < result.sparsity < 0.9
    if "max_kl" in limit:
        assert 0.5 * 0.05 < result.tried[0].kl <= 0.05


def test_goal_out_of_reach_writes_nothing(folder, converted):
    with pytest.raises(SpqtError, match="can't be met") as caught:
        calibrate.calibrate(folder, dataclasses.replace(OPTIONS, sparsity=None, max_kl=1e-9), lambda *_: None)
    assert caught.value.exit_code == 3
    assert (folder / "config.json").read_bytes() == (converted / "config.json").read_bytes()


@pytest.mark.parametrize("bad", [{"max_kl": 0.1}, {"sparsity": None, "max_kl": 0.1, "max_ppl_increase": 2.0}])
def test_goals_exclude_one_another(folder, bad):
    with pytest.raises(UsageError, match="exclude"):
        calibrate.calibrate(folder, dataclasses.replace(OPTIONS, **bad), lambda *_: None)
