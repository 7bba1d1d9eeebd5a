"""A device's profile is followed wherever a model is loaded to run, and nowhere where it is measured."""

import logging
import sys

import mlx_lm
import pytest
from mlx import nn
from mlx_lm import cli

import spqt_cli
from spqt_cli.cli import mlx_lm as passthrough
from spqt_cli.decode import hooks, profile, session
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.decode.options import Prompt
from spqt_cli.decode.profile import ROWS, SPARSE, ZIGZAG, Choice
from spqt_cli.evaluate import compare, compare_report, lm_eval, perplexity
from spqt_cli.evaluate.variants import EvaluateOptions


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def followed(calibrated):
    """A profile by which this model's o_proj run dense and its down_proj row-grouped."""
    layers = profile.units(session.load(calibrated).model)
    choices = {"o_proj": Choice(0.0, ZIGZAG), "down_proj": Choice(0.0, ROWS)}
    profile.write({one.key: choices[one.name] for one in layers if one.name in choices}, {})


def ways(network: nn.Module) -> dict[str, str]:
    """Last name of each layer's path -> how it runs."""
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            zigzag = isinstance(module, ZigzagLinear)
            way = ROWS if not zigzag else ZIGZAG if module.threshold is None else SPARSE
            found[path.rpartition(".")[2]] = way
    return found


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AS_STORED = dict.fromkeys(NAMES, SPARSE)
FOLLOWING = {**AS_STORED, "o_proj": ZIGZAG, "down_proj": ROWS}


def test_every_way_to_load_a_model_follows_the_profile(calibrated, followed):
    assert ways(session.load(calibrated).model) == FOLLOWING
    assert ways(spqt_cli.load(str(calibrated))[0]) == FOLLOWING
    assert ways(mlx_lm.load(str(calibrated))[0]) == FOLLOWING
    assert set(ways(session.load(calibrated, dense=True).model).values()) == {ZIGZAG}
    with hooks.as_stored():
        assert ways(mlx_lm.load(str(calibrated))[0]) == AS_STORED


def test_compare_follows_the_profile(calibrated, followed):
    dense, sparse = compare.compare(str(calibrated), Prompt("fox"), [0.0, 0.4], compare.Effort(4))
    assert "profile" not in dense.statistics.note
    assert "profile of this device: 2 zigzag, 2 row-grouped layers" in sparse.statistics.note
    assert "row-grouped" in compare_report.report([dense, sparse])
    alone = compare.compare(str(calibrated), Prompt("fox"), [0.0], compare.Effort(4))
    assert dense.perplexity == alone[0].perplexity


@pytest.mark.parametrize(
    ("command", "expected"), [("evaluate", AS_STORED), ("perplexity", AS_STORED), ("chat", FOLLOWING)]
)
def test_commands_of_mlx_lm_that_measure_run_the_model_as_stored(
    calibrated, followed, monkeypatch, command, expected
):
    seen = {}
    monkeypatch.setattr(cli, "main", lambda: seen.update(ways(mlx_lm.load(str(calibrated))[0])))
    monkeypatch.setattr(lm_eval, "prepare", lambda: None)
    monkeypatch.setattr(sys, "argv", ["spqt"])
    passthrough.run([command, "--model", str(calibrated)])
    assert seen == expected


def test_a_damaged_profile_is_told_of(calibrated, caplog):
    profile.path().parent.mkdir(parents=True, exist_ok=True)
    profile.path().write_text("{")
    with caplog.at_level(logging.INFO, "spqt"):
        mlx_lm.load(str(calibrated))
    assert "ignored" in caplog.text
    assert "ignored" in session.load(calibrated).note


def test_eval_is_of_the_model_as_stored(calibrated, tmp_path, request):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    options = EvaluateOptions(windows=2, window=32)

    def perplexities() -> list[float]:
        found = perplexity.evaluate(calibrated, tmp_path / "text.txt", options, lambda *_: None)
        return [row.perplexity for row in found.variants]

    before = perplexities()
    request.getfixturevalue("followed")
    assert perplexities() == before
