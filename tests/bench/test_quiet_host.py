"""Disturbed hosts: which repetitions count as quiet, and the figures over those."""

import csv
import dataclasses
import io
import json

import pytest

from spqt_cli.bench import bench, model_timing, models, quiet_host, results
from spqt_cli.bench.quiet_host import Quiet, Watch
from spqt_cli.bench.results import ModelRow, Report, Stat
from tests.bench.test_bench import tiny_subject

CALM, EDGE, BUSY = 560.0, 700.0, 700.1  # the limit is 1.25 times the fastest


def watch(monkeypatch, *loops_us: float) -> Watch:
    """A watch that has seen these loops."""
    times = iter(loops_us)
    monkeypatch.setattr(quiet_host, "loop_us", lambda: next(times))
    result = Watch()
    for _ in loops_us:
        result.look()
    return result


# --- the loop and the verdict


def test_one_interrupted_loop_does_not_count(monkeypatch):
    clock = iter([0, 0.0005, 1, 1.0009, 2, 2.0004, 3, 3.0006, 4, 4.0500])  # begin and end of five loops
    monkeypatch.setattr(quiet_host.time, "perf_counter", lambda: next(clock))
    assert quiet_host.loop_us() == pytest.approx(600)  # of 500, 900, 400, 600 and 50,000


def test_one_loop_of_one_variant_disturbs_the_repetition(monkeypatch):
    looked = watch(monkeypatch, CALM)
    stock = [(CALM, CALM), (CALM, BUSY), (CALM, CALM), (CALM, CALM)]
    ours = [(CALM, CALM), (CALM, CALM), (BUSY, CALM), (EDGE, EDGE)]
    assert looked.quiet([stock, ours]) == [True, False, False, True]


def test_the_fastest_loop_is_that_of_the_whole_run(monkeypatch):
    looked = watch(monkeypatch, BUSY, BUSY)
    assert looked.quiet([[(BUSY, BUSY)]]) == [True]  # disturbed all along: nothing shows it yet
    monkeypatch.setattr(quiet_host, "loop_us", lambda: CALM)
    assert looked.look() == CALM
    assert looked.quiet([[(BUSY, BUSY)]]) == [False]


# --- the figures of one row


def test_figures_are_those_of_the_quiet_repetitions():
    quiet = Quiet([True, False, True, True, False], [1.4, 9.0, 1.19, 1.31, 0.1])
    assert quiet.text() == "3 of 5: 1.31x (1.19-1.40)"
    plain = quiet.plain()
    assert (plain["repetitions"], plain["of"]) == (3, 5)
    assert (plain["median"], plain["min"], plain["max"]) == (1.31, 1.19, 1.4)
    assert plain["each"] == quiet.each


@pytest.mark.parametrize(("each", "says"), [([False] * 3, "none of 3"), ([False, True, False], "1 of 3")])
def test_fewer_than_two_quiet_repetitions_give_no_figure(each, says):
    quiet = Quiet(each, [1.1, 1.2, 1.3])
    assert quiet.text() == f"{says}: no figure"
    assert [quiet.plain()[name] for name in ("median", "min", "max")] == [None] * 3
    assert quiet.plain()["repetitions"] == sum(each)


def test_all_quiet_adds_no_second_figure():
    assert Quiet([True, True], [1.0, 2.0]).text() == "all 2"


# --- in a benchmark


REPETITIONS = 3


@pytest.fixture(scope="module")
def subject() -> models.Subject:
    return tiny_subject()


def measured(monkeypatch, subject, loops_us) -> Report:
    """A report whose k-th sample ran at k tokens/s; loops_us: of looks in turn, then CALM ones."""
    rates, times = iter(range(1, 100)), iter(loops_us)
    monkeypatch.setattr(bench, "make_subject", lambda options: subject)
    monkeypatch.setattr(model_timing, "_decode_rate", lambda *_: float(next(rates)))
    monkeypatch.setattr(quiet_host, "loop_us", lambda: next(times, CALM))
    options = bench.Options(
        shape="tiny", sparsities=[], prompt_tokens=[], generation_tokens=4, repetitions=REPETITIONS
    )
    return bench.run(options)


def disturbed(repetition: int, look: int) -> list[float]:
    """Loops of a run with one slow look: 0 and 1 beside stock's sample, 2 and 3 beside ours.

    repetition: 0 warms up.
    """
    return [CALM] * (4 * repetition + look) + [BUSY]


def test_a_disturbed_sample_is_left_out_of_its_own_figure(monkeypatch, subject):
    report = measured(monkeypatch, subject, disturbed(2, 3))
    stock, dense = report.rows
    assert stock.quiet_host.each == [True, True, True]
    assert dense.quiet_host.each == [True, False, True]
    assert dense.host_us == [(CALM, CALM), (CALM, BUSY), (CALM, CALM)]
    assert dense.speedup.samples == pytest.approx([4 / 3, 6 / 5, 8 / 7])  # all of them stay
    assert dense.quiet_host.samples == pytest.approx([4 / 3, 8 / 7])
    assert report.machine["host_loop_us"] == CALM
    assert "disturbed in 1 of 3" in report.notes[-1]


def test_a_disturbed_sample_of_stock_is_left_out_of_every_figure(monkeypatch, subject):
    report = measured(monkeypatch, subject, disturbed(3, 0))
    stock, dense = report.rows
    assert stock.quiet_host.each == dense.quiet_host.each == [True, True, False]
    assert dense.quiet_host.samples == pytest.approx([4 / 3, 6 / 5])


def test_disturbance_while_warming_up_disturbs_no_repetition(monkeypatch, subject):
    report = measured(monkeypatch, subject, disturbed(0, 3))
    assert all(row.quiet_host.each == [True] * REPETITIONS for row in report.rows)
    assert "quiet in all 3" in report.notes[-1]


def test_a_host_disturbed_throughout_gives_no_figure(monkeypatch, subject):
    report = measured(monkeypatch, subject, [CALM] * 4 + [BUSY] * 4 * REPETITIONS)
    assert "disturbed in 3 of 3" in report.notes[-1]
    text = results.render(report, "md")
    assert text.count("none of 3: no figure") == 2
    assert "1.20 (1.14-1.33)" in text  # 6/5, 8/7, 4/3: the figure over all stays


# --- in the four forms


def report(each: list[bool]) -> Report:
    stat = Stat([1.0, 2.0, 6.0])
    row = ModelRow("tg8", 0, "stock", None, None, stat, stat, 1e6, 1e6, 0.5, 1e9, None, [(CALM, BUSY)] * 3)
    row.quiet_host = Quiet(each, stat.samples)
    calm = dataclasses.replace(row, test="tg9", quiet_host=Quiet([True] * 3, stat.samples))
    return Report({"device": "d"}, {}, [row, calm])


def test_markdown_has_the_figure_over_all_first():
    head, _, line, calm = results.render(report([True, False, True]), "md").splitlines()[:4]
    assert head.index("x stock (median, range)") < head.index("quiet host")
    assert line.index("2.00 (1.00-6.00)") < line.index("2 of 3: 3.50x (1.00-6.00)")
    assert "all 3" in calm


def test_markdown_has_no_column_when_all_was_quiet():
    text = results.render(report([True] * 3), "md")
    assert "quiet host" not in text
    assert "2.00 (1.00-6.00)" in text


def test_csv_lines_hold_figures_and_no_lists():
    text = results.render(report([True, False, True]), "csv")
    disturbed, calm = csv.DictReader(io.StringIO(text))
    assert "[" not in text
    assert (disturbed["quiet_host_repetitions"], disturbed["quiet_host_of"]) == ("2", "3")
    assert (disturbed["quiet_host_median"], calm["quiet_host_median"]) == ("3.5", "2.0")
    (none, _) = csv.DictReader(io.StringIO(results.render(report([False] * 3), "csv")))
    assert (none["quiet_host_repetitions"], none["quiet_host_median"]) == ("0", "")
    assert none["speedup_median"] == "2.0"


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_json_holds_the_loops_of_every_sample(form):
    text = results.render(report([True, False, False]), form)
    row = json.loads(text)["rows"][0] if form == "json" else json.loads(text.splitlines()[0])
    assert row["host_us"] == [[CALM, BUSY]] * len(row["rate"]["samples"])
    assert row["quiet_host"] == {
        "repetitions": 1, "of": 3, "median": None, "min": None, "max": None, "each": [True, False, False],
    }  # fmt: skip
