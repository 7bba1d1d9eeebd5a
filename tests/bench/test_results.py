"""Reports of a benchmark: statistics and the four forms."""

import csv
import io
import json

import pytest

from spqt_cli.bench import results
from spqt_cli.bench.results import KernelRow, ModelRow, Report, Stat
from spqt_cli.errors import UsageError


def test_one_sample_is_no_result():
    with pytest.raises(UsageError, match="spread"):
        Stat([1.0])


def test_ratios_are_taken_repetition_by_repetition():
    stock, ours = Stat([1.0, 2.0]), Stat([2.0, 4.0])  # the machine slowed down, the ratio did not
    assert results.ratio(ours, stock, of_times=False).samples == [2.0, 2.0]
    assert results.ratio(ours, stock, of_times=True).samples == [0.5, 0.5]


def report() -> Report:
    stat = Stat([1.0, 2.0, 6.0])
    rows = [
        ModelRow("tg8", 16, "stock", None, None, stat, stat, 1e6, 1e6, 0.5, 1e9, None, []),
        ModelRow("pp8", 0, "sparse 50%", 0.5, 0.49, stat, stat, None, None, None, 1e9, 0.25, []),
    ]
    return Report({"device": "d, e"}, {"model": "m"}, rows, [], ["a note"])


def test_markdown_is_one_table_with_mean_and_spread():
    lines = results.render(report(), "md").splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "3.00 ± 2.65" in lines[2]  # statistics of 1, 2, 6 by hand: mean 3, deviation sqrt(14 / 2)
    assert "2.00 (1.00-6.00)" in lines[2]
    assert "tg8 @ d16" in lines[2]
    assert "n/a" in lines[2]
    assert lines[-1] == "note: a note"


def test_csv_has_a_line_a_row_and_survives_commas():
    rows = list(csv.DictReader(io.StringIO(results.render(report(), "csv"))))
    assert [row["variant"] for row in rows] == ["stock", "sparse 50%"]
    assert rows[0]["device"] == "d, e"
    assert float(rows[0]["rate_median"]) == 2


def test_json_holds_every_sample():
    document = json.loads(results.render(report(), "json"))
    assert document["rows"][0]["rate"]["samples"] == [1.0, 2.0, 6.0]
    assert document["notes"] == ["a note"]


def test_json_lines_stand_alone():
    lines = [json.loads(line) for line in results.render(report(), "jsonl").splitlines()]
    assert [line["variant"] for line in lines] == ["stock", "sparse 50%"]
    assert all(line["machine"] == {"device": "d, e"} for line in lines)


def test_kernel_rows_have_a_table_too():
    stat = Stat([1.0, 3.0])
    row = KernelRow("up", "8x8", "stock", None, stat, stat, stat, 1e3, None, 1e9, 0.5)
    text = results.render(Report({}, {}, [row]), "md")
    assert "2.0 ± 1.4" in text
