"""What a calibration is expected to run is what it runs; the time grows with it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.calibrate import calibrate as calibrator
from spqt_cli.calibrate import cost
from spqt_cli.calibrate.methods import METHODS
from spqt_cli.decode import session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.format.folder import Folder
from spqt_cli.measure import probes

WINDOWS = cost.Windows(calibrating=12, held_out=4, length=64)


@pytest.mark.parametrize(("method", "limit"), [("auto", {}), ("uniform", {}), ("fast", {"max_kl": 5.0})])
def test_as_many_tokens_are_run_as_expected(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, limit: dict[str, Any]
):
    ran = 0

    def counted(real: Any) -> Any:
        def run(model: Any, tokens: mx.array, *rest: Any) -> Any:
            nonlocal ran
            ran += tokens.size
            return real(model, tokens, *rest)

        return run

    monkeypatch.setattr(probes, "advance", counted(probes.advance))
    monkeypatch.setattr(probes, "continuation", counted(probes.continuation))
    folder = tmp_path / "m"
    shutil.copytree(converted, folder)
    wanted: dict[str, Any] = limit or {"sparsity": 0.3}
    options = calibrator.CalibrateOptions(tokens=12 * 32, window=32, method=method, **wanted)
    calibrator.calibrate(folder, options, lambda *_: None)
    windows = cost.Windows(calibrating=9, held_out=3, length=32)
    expected = cost.work(windows, METHODS[method], 7, searches=bool(limit))
    assert ran == pytest.approx(expected.tokens + expected.sloped, rel=0.05)  # some leave the last token out


def test_what_an_interrupted_run_did_is_not_expected_again():
    whole = cost.work(WINDOWS, METHODS["fast"], 7, searches=False)
    rest = cost.work(replace(WINDOWS, observed=12, differentiated=2), METHODS["fast"], 7, searches=False)
    assert whole.tokens - rest.tokens == 12 * 64
    assert (whole.gradients, rest.gradients) == (2, 0)


def test_time_grows_with_the_work(converted: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cost, "speed", lambda: 1e9)
    model = session.load_lazily(Folder(converted)).model
    layers, weights = zigzag_layers(model), 200_000

    def seconds(method: str, **changes: Any) -> float:
        windows = replace(WINDOWS, **changes)
        return cost.seconds(layers, weights, cost.work(windows, METHODS[method], 7, searches=False))

    assert seconds("uniform") < seconds("auto") < seconds("paper")
    assert seconds("fast") < seconds("fast", calibrating=48, held_out=16)
    doubled = cost.work(WINDOWS, METHODS["fast"], 7, searches=True)
    assert seconds("fast") < cost.seconds(layers, weights, doubled)
