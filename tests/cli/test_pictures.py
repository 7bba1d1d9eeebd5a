"""--plot of calibrate, inspect, bench and compare: what is drawn; what is refused first."""

import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from spqt_cli.cli import pictures, worker
from spqt_cli.errors import SpqtError
from spqt_cli.format.folder import Folder
from spqt_cli.format.thresholds import QUANTILES
from spqt_cli.system import picture
from tests.cli.test_commands import assert_error, spqt

pytest.importorskip("matplotlib", reason="the extra `plot`")


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


def texts(svg: Path) -> list[str]:
    """What is written in a picture."""
    return [one.text or "" for one in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_inspect_draws_every_layer_and_the_inputs_of_one(calibrated: Path, tmp_path: Path):
    path = tmp_path / "model.svg"
    result = spqt("inspect", calibrated, "--plot", path)
    assert (result.returncode, result.stderr.decode()) == (0, f"wrote {path}\n")
    written = texts(path)
    folder = Folder(calibrated)
    rows = folder.calibration.record["layers"]
    for name in folder.layers:
        assert f"{rows[name]['realised']:.0%}"[:-1] in written
    assert {"q_proj", "down_proj"} <= set(written)
    most = max(rows, key=lambda name: rows[name]["realised"])
    assert f"inputs of {most}" in written
    assert any(
        re.match(r"magnitude of an input, dense, .*; below [\d.e-]+ \(the line\) it is skipped", text)
        for text in written
    )
    other = next(name for name in rows if name != most)
    assert spqt("inspect", calibrated, "--plot", path, "--layer", other).returncode == 0
    assert f"inputs of {other}" in texts(path)


def test_a_page_is_one_file_that_needs_no_other(calibrated: Path, tmp_path: Path):
    path = tmp_path / "model.html"
    assert spqt("inspect", calibrated, "--plot", path).returncode == 0
    text = path.read_text()
    assert text.count("<svg ") == text.count('role="img"') == 3
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "prefers-color-scheme: dark" in text
    assert picture.INK[0] not in text.split("</style>")[1]


def test_calibrate_and_bench_and_compare_draw(converted: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    flags = ("--sparsity", 0.3, "--tokens", 1024, "--method", "fast")
    assert (
        f"wrote {tmp_path / 'a.svg'}"
        in spqt("calibrate", folder, *flags, "--plot", tmp_path / "a.svg").stderr.decode()
    )
    assert "up_proj" in texts(tmp_path / "a.svg")
    bench = spqt("bench", folder, "-p", 0, "-g", 4, "-r", 2, "--plot", tmp_path / "b.svg", "--json")
    assert (bench.returncode, bench.stderr) == (0, b"")
    assert {"tg4 at depth 0", "tokens per second", "stock mlx-lm", "25", "50"} <= set(
        texts(tmp_path / "b.svg")
    )
    compared = ("compare", folder, "-p", "fox", "-m", 4, "--sparsity", "0,0.3", "--plot", tmp_path / "c.png")
    assert f"wrote {tmp_path / 'c.png'}" in spqt(*compared).stderr.decode()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_histogram_is_of_the_layers_own_inputs(calibrated: Path):
    """What it shows below the threshold is what the layer skips, whatever the model skips in all."""
    from matplotlib.figure import Figure

    folder = Folder(calibrated)
    realised = {path: row["realised"] for path, row in folder.calibration.record["layers"].items()}
    assert max(realised.values()) - min(realised.values()) > 0.1
    for path, layer in folder.layers.items():
        quantiles, axes = pictures._quantiles(folder, path), Figure().add_subplot()
        pictures._inputs(axes, path, quantiles, layer.threshold)
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(98, abs=0.1)
        below = np.interp(layer.threshold, quantiles, QUANTILES)
        assert below == pytest.approx(realised[path], abs=0.06)  # on held-out text, others being masked
        orange = [bar for bar in axes.patches if bar.get_x() < layer.threshold]
        assert sum(bar.get_height() for bar in orange) == pytest.approx(100 * below, abs=0.1)
        assert len({bar.get_facecolor() for bar in orange}) == 1


def test_a_threshold_at_the_ends_of_the_histogram():
    quantiles = [float(i) for i in range(len(QUANTILES))]
    for threshold in (0.0, quantiles[-1], 1e9, 1e-9):
        edges, shares = pictures._binned(quantiles, threshold, 6)
        assert len(edges) == 7
        assert edges == sorted(edges)
        assert sum(shares) == pytest.approx(98)


@pytest.mark.parametrize("recorded", [None, {}, {"x": 3}, [1.0], "short", "falling", "negative"])
def test_a_folder_that_does_not_say_what_enters_layers(calibrated: Path, tmp_path: Path, recorded: object):
    shutil.copytree(calibrated, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    kept = config["spqt"]["calibration"]["quantiles"]
    changed = {"short": slice(1, None), "falling": slice(None, None, -1)}
    if recorded == "negative":
        recorded = {path: [-1.0, *values[1:]] for path, values in kept.items()}
    elif isinstance(recorded, str):
        recorded = {path: values[changed[recorded]] for path, values in kept.items()}
    config["spqt"]["calibration"]["quantiles"] = recorded
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    folder = Folder(tmp_path / "m")
    assert [panel.label[:8] for panel in pictures.of_folder(folder, None).panels] == ["Heat map", "Heat map"]
    with pytest.raises(SpqtError, match="does not say what enters"):
        pictures.of_folder(folder, next(iter(folder.layers)))


def test_variants_with_a_profile_are_a_line_of_their_own():
    from matplotlib.figure import Figure

    speeds = [
        pictures.Speed(at, [5.0, 7.0, 6.0], profiled) for profiled in (False, True) for at in (0.0, 0.5)
    ]
    axes = Figure().add_subplot()
    pictures._speed(axes, "tg4", speeds, [1.0, 2.0])
    lines = [one for one in axes.containers if len(one.lines[0].get_xdata())]
    assert [list(one.lines[0].get_xdata()) for one in lines] == [[0, 50], [0, 50]]
    assert "profile" in [one.get_text() for one in axes.texts]


def test_the_terminal_needs_no_matplotlib(
    converted: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda _: None)
    shutil.copytree(converted, tmp_path / "m")
    fast = ("--sparsity", 0.3, "--tokens", 1024, "--method", "fast", "--plot", "-")
    shown = {
        "calibrate": spqt("calibrate", tmp_path / "m", *fast),
        "inspect": spqt("inspect", tmp_path / "m", "--plot", "-"),
        "bench": spqt("bench", calibrated, "-p", 0, "-g", 4, "-r", 2, "--plot", "-"),
        "compare": spqt("compare", calibrated, "-p", "fox", "-m", 4, "--sparsity", "0,0.3", "--plot", "-"),
    }
    for name, done in shown.items():
        assert done.returncode == 0, (name, done.stderr.decode())
    calibrate, inspect, bench, compare = (done.stdout.decode() for done in shown.values())
    for text in (calibrate, inspect):
        _, _, drawn = text.partition("percent of inputs skipped")
        assert "its price: KL to dense by this layer alone" in drawn
        assert max(map(len, drawn.splitlines())) <= 80
    assert re.search(r"inputs of \S+, dense, .*; below \S+ \(orange\) they are", " ".join(inspect.split()))
    assert "stock mlx-lm" in bench
    assert "25% skipped" in bench
    assert "KL to dense, nats" in compare
    both = spqt("inspect", calibrated, "--plot", "-", "--json")
    assert both.returncode == 2
    assert b"both want stdout" in both.stdout
    assert_error(spqt("inspect", calibrated, "--plot", tmp_path / "x.png"), 4, "--plot -", "spqt[plot]")


def test_prices_are_those_of_the_gradients(calibrated: Path, tmp_path: Path):
    """auto measures gradients, uniform has none: no map of prices then, and a note says why."""
    record = Folder(calibrated).calibration.record
    prices = {path: row["price"] for path, row in record["layers"].items()}
    assert all(price >= 0 for price in prices.values())
    assert 0.1 < sum(prices.values()) / record["kl"] < 10  # they add up to about the KL
    drawn = pictures.of_folder(Folder(calibrated), None)
    assert [panel.label[:8] for panel in drawn.panels] == ["Heat map", "Heat map", "Distribu"]
    shutil.copytree(calibrated, tmp_path / "m")
    flags = ("--sparsity", 0.3, "--tokens", 1024, "--method", "uniform")
    assert spqt("calibrate", tmp_path / "m", *flags).returncode == 0
    drawn = pictures.of_folder(Folder(tmp_path / "m"), None)
    assert [panel.label[:8] for panel in drawn.panels] == ["Heat map", "Distribu"]
    assert "auto, fast" in drawn.note


@pytest.mark.parametrize("layers", [None, {}, {"x": 3}, "x"])
def test_a_folder_that_does_not_say_what_layers_skip(calibrated: Path, tmp_path: Path, layers: object):
    shutil.copytree(calibrated, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["spqt"]["calibration"]["layers"] = layers
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert_error(spqt("inspect", tmp_path / "m", "--plot", "-"), 3, "spqt calibrate")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["inspect", "M", "--plot", "x.gif"], 2, "no picture's name"),
        (["inspect", "M", "--plot", "gone/x.png"], 2, "no folder"),
        (["inspect", "M", "--layer", "q"], 2, "--plot"),
        (["inspect", "M", "--plot", "x.png", "--layer", "q"], 3, "no Zigzag layer q"),
        (["calibrate", "M", "--plot", "x.gif"], 2, "no picture's name"),
        (["compare", "M", "-p", "fox", "--plot", "x.gif"], 2, "no picture's name"),
        (["bench", "M", "--plot", "x.gif"], 2, "no picture's name"),
        (["bench", "M", "--kernel", "--plot", "x.png"], 2, "tokens per second"),
        (["bench", "M", "-g", "0", "--plot", "x.png"], 2, "decoding"),
    ],
)
def test_what_can_not_be_drawn_is_refused(
    calibrated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    code: int,
    says: str,
):
    monkeypatch.chdir(tmp_path)
    assert_error(spqt(*(str(calibrated) if one == "M" else one for one in command)), code, says)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_thresholds_has_nothing_to_draw(converted: Path, tmp_path: Path):
    assert_error(
        spqt("inspect", converted, "--plot", tmp_path / "x.png"), 3, "no thresholds", "spqt calibrate"
    )
