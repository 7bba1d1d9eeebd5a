"""The picture of `spqt eval --plot`: every variant drawn and named, one file, light and dark."""

import itertools
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from spqt_cli.cli import worker
from spqt_cli.errors import ResourceError, UsageError
from spqt_cli.evaluate import plotting
from spqt_cli.evaluate.several_report import Compared, Several, TextResult, hold_against
from spqt_cli.measure.scoring import Against
from spqt_cli.system import picture
from tests.cli.test_commands import assert_error, spqt

pytest.importorskip("matplotlib", reason="the extra `plot`")


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


def variant(model: str, mb: float, kl: float, sparsity: float | None = None) -> Compared:
    windows = [kl - 0.01, kl + 0.01]
    against = {"source": Against(kl, 0.01, kl, kl, kl, 0.7, windows)}
    name = f"{model} {sparsity:.0%}" if sparsity else model
    return Compared(
        name, sparsity, sparsity or 0.0, 30.0, 2.0, windows, against, model=model, bytes_per_token=mb * 1e6
    )


@pytest.fixture
def result() -> Several:
    texts = []
    for name, factor in (("wiki.txt", 1.0), ("<code> & $tables$", 1.2)):
        variants = [
            Compared("source", None, 0.0, 28.0, 2.0, [0.0, 0.0], {}, model="source", bytes_per_token=269e6),
            variant("row-grouped", 79.2, 0.31 * factor),
            variant("a_model_of_a_very_long_name", 79.2, 0.28 * factor),
            variant("a_model_of_a_very_long_name", 54.0, 0.41 * factor, 0.4),
            variant("fitted", 79.2, 0.12 * factor),
            variant("fitted", 54.0, 0.22 * factor, 0.4),
        ]
        texts.append(TextResult(name, "0" * 64, 2, 512, 510, variants))
    return Several({}, hold_against(texts, None), texts)


def test_a_series_per_model_and_none_of_the_source(result):
    found = plotting.series(result.texts[0])
    assert [one.label for one in found] == ["row-grouped", "a_model_of_a_very…", "fitted"]
    assert found[2].sizes == [79.2, 54.0]
    assert found[2].costs == [0.12, 0.22]
    assert len({(one.colour, one.mark) for one in found}) == 3


def test_png_has_its_size_by_its_panels(result, tmp_path):
    plotting.draw(result, tmp_path / "two.png")
    data = (tmp_path / "two.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert height / width == pytest.approx(2 * picture.HEIGHT / picture.WIDTH, rel=0.01)


def texts_of(svg: ET.Element) -> list[str]:
    return ["".join(one.itertext()).strip() for one in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_svg_names_texts_models_and_shares(result, tmp_path):
    path = tmp_path / "picture.svg"
    plotting.draw(result, path)
    found = texts_of(ET.parse(path).getroot())
    for name in ("wiki.txt, 2 windows", "<code> & $tables$, 2 windows", "row-grouped", "fitted", "40%"):
        assert name in found
    before = path.read_bytes()
    plotting.draw(result, path)
    assert path.read_bytes() == before


def test_names_do_not_overlap(result, tmp_path):
    close = [variant("row-grouped", 79.2, 0.300), variant("near", 79.2, 0.301), variant("far", 79.0, 0.302)]
    result.texts = [TextResult("t", "0" * 64, 2, 512, 510, close)]
    plotting.draw(result, tmp_path / "picture.svg")
    root = ET.parse(tmp_path / "picture.svg").getroot()
    heights = []
    for one in root.iter("{http://www.w3.org/2000/svg}text"):
        if "".join(one.itertext()).strip() in ("row-grouped", "near", "far"):
            moved = re.search(r"translate\(\S+ (\S+)\)|y=\"(\S+)\"", one.get("transform", ""))
            heights.append(float(moved[1] if moved else one.get("y")))
    heights.sort()
    assert len(heights) == 3
    assert all(b - a >= plotting.LABEL_POINTS - 0.1 for a, b in itertools.pairwise(heights))


def test_a_page_is_one_file_for_light_and_dark(result, tmp_path):
    plotting.draw(result, tmp_path / "picture.html")
    page = (tmp_path / "picture.html").read_text()
    assert page.count("<svg") == 2
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)  # nothing is fetched
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)
    for name in set(re.findall(r"var\(--(\w+)\)", page)):
        assert page.count(f"--{name}: #") == 2, name
    body = page[page.index("<main>") :]
    assert not re.search("#[0-9a-f]{6}", body)  # every colour is a variable
    assert "&lt;code&gt; &amp; $tables$: 510 positions" in body
    own = set(re.findall(r'\bid="([^"]+)"', body))
    assert set(re.findall(r'href="#([^"]+)"', body)) <= own


def test_what_can_not_be_drawn_is_refused_before_any_work(calibrated, tmp_path):
    for path, baseline, says in (
        (tmp_path / "picture.jpg", "source", ".png"),
        (tmp_path / "picture.png", None, "--baseline"),
        (tmp_path / "none" / "picture.png", "source", "folder"),
    ):
        with pytest.raises(UsageError) as caught:
            plotting.check(path, baseline)
        assert says in f"{caught.value.cause} {caught.value.hint}"
    result = spqt("eval", calibrated, "no-such-text", "--plot", tmp_path / "picture.jpg")
    assert_error(result, 2, ".png")


def test_a_place_that_can_not_be_written(result, tmp_path):
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(ResourceError, match="can't be written"):
        plotting.draw(result, tmp_path / "picture.png")


def test_without_the_extra_one_line(calibrated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "text.txt").write_text("fox")
    flags = ("--baseline", "x", "--plot", tmp_path / "p.png")
    result = spqt("eval", calibrated, tmp_path / "text.txt", *flags)
    assert_error(result, 4, "pip install 'spqt[plot]'")


def test_the_command_draws(calibrated, checkpoint, tmp_path: Path):
    text, path = tmp_path / "text.txt", tmp_path / "picture.svg"
    text.write_text("pack my box with five dozen liquor jugs " * 200)
    result = spqt(
        "eval", calibrated, text, "--windows", 1, "--baseline", checkpoint, "--rows", "--plot", path
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr.decode().endswith(f"\nwrote {path}\n")
    assert {"text.txt, 1 windows", "row-grouped", "40%"} <= set(texts_of(ET.parse(path).getroot()))


def test_in_the_terminal_every_row_has_a_bar_of_its_length(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plotting.draw(result, picture.TERMINAL)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    first = shown.partition("<code>")[0]
    rows = [line for line in first.splitlines() if "MB/token" in line]
    bars = {re.split(r"\s\s|█", line.strip())[0]: line.count("█") for line in rows}
    assert bars == {
        "row-grouped": 21, "a_model_of_a_very…": 19, "a_model_of_a_very… 40%": 28,
        "fitted": 8, "fitted 40%": 15,
    }  # fmt: skip
    assert "0.120 at 79.2 MB/token" in first
