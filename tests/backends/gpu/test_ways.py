"""Which way many rows are multiplied: timed within five seconds, remembered, and told.

Contract: the fastest way at each number of rows is taken; compiling takes nothing of the time for timing; no
timing begins when time is over, and what was not timed is reckoned from what was; a choice is made once per
machine and kind of layer, and a damaged file is as none.
"""

import json

import mlx.core as mx
import pytest

from spqt_cli.backends.gpu import first_use, kernel_text, ways
from spqt_cli.backends.gpu.ways import COUNTS, Choice, Kind
from spqt_cli.backends.interface import Backend
from spqt_cli.cli import doctor

KIND = Kind(mx.float16, 4, 64)
COST = {  # microseconds of a call with so many rows
    "few": lambda rows: 20 + 10 * -(-rows // 8),
    "matrix": lambda rows: 40 + 40 * -(-rows // 64),
    "quantized": lambda rows: 1000,
    "dequantized": lambda rows: 200 + rows / 10,
}


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A CUDA device whose calls cost COST, with a cache of its own; returns each (way, rows) timed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 9, "device_name": "some"})
    monkeypatch.setattr(first_use, "_refused", {})
    for cached in (first_use.machine, ways.here, ways.known):
        cached.cache_clear()
    monkeypatch.setattr(ways, "SHAPE", (64, 32))
    monkeypatch.setattr(ways, "_layer", lambda *_: None)
    monkeypatch.setattr(ways, "_chosen", {})
    timed = []

    def microseconds(call, x, layers):
        way, rows = call(x, layers[0]), x.shape[1]
        timed.append((way, rows))
        return COST[way](rows)

    monkeypatch.setattr(ways, "_microseconds", microseconds)
    yield timed
    for cached in (first_use.machine, ways.here, ways.known):
        cached.cache_clear()


CALLS = {way: lambda x, layer, way=way: way for way in COST}


def test_the_fastest_way_is_taken_at_each_number_of_rows(device):
    choice = ways.choice_for(KIND, CALLS)
    expected = [
        min((COST[way](count), way) for way in COST if ways.is_possible(way, count, mx.float16))[1]
        for count in COUNTS
    ]
    assert choice.ways == expected
    assert set(expected) == {"few", "matrix", "dequantized"}


def test_rows_between_two_counts_go_as_the_larger(device):
    class Layer:
        bits, group_size = 4, 64

    found = [ways.best(rows, Layer(), mx.float16, CALLS) for rows in (2, 5, 8, 9, 300, 512, 5000)]
    choice = ways.choice_for(KIND, CALLS)
    assert found == [choice.ways[i] for i in (0, 1, 1, 2, 7, 7, 8)]


def test_a_choice_is_made_once_for_a_machine_and_kind(device):
    first = ways.choice_for(KIND, CALLS)
    timed = len(device)
    ways.known.cache_clear()
    ways._chosen.clear()  # as a new process would
    assert ways.choice_for(KIND, CALLS) == first
    assert len(device) == timed
    ways.choice_for(KIND._replace(bits=8), CALLS)
    assert len(device) == 2 * timed


def test_other_kernels_are_timed_again(device, monkeypatch):
    ways.choice_for(KIND, CALLS)
    timed = len(device)
    body = kernel_text.body
    monkeypatch.setattr(
        kernel_text, "body", lambda name: body(name) + "int more;" * (name == "gemm_rows.metal")
    )
    ways.here.cache_clear()
    ways._chosen.clear()
    assert not ways.report()
    ways.choice_for(KIND, CALLS)
    assert len(device) == 2 * timed
    assert len(ways.report()) == 1


def test_kernels_found_wrong_leave_no_choice_behind(device, monkeypatch):
    monkeypatch.setattr(first_use, "_refused", {"a kernel": "found wrong"})
    ways.choice_for(KIND, CALLS)
    assert not ways._file().exists()


NO_WAYS = '{"a": {"ways": [], "us": {}, "seconds": 1, "compiled": 1}}'


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', NO_WAYS])
def test_a_damaged_file_is_timed_again(device, text):
    ways._file().parent.mkdir(parents=True, exist_ok=True)
    ways._file().write_text(text)
    assert ways.choice_for(KIND, CALLS).ways
    assert len(json.loads(ways._file().read_text())) == 1


def clocked(monkeypatch, seconds):
    """Calls that take so long each, by a clock of their own; returns them and what the clock says."""
    clock = [0.0]
    monkeypatch.setattr(ways.time, "perf_counter", lambda: clock[0])
    calls = {}
    for way in COST:

        def call(x, layer, way=way):
            clock[0] += seconds
            return way

        calls[way] = call
    return calls, clock


def test_no_timing_begins_when_time_is_over(device, monkeypatch):
    slow, _ = clocked(monkeypatch, 0.9)
    choice = ways.choice_for(KIND, slow)
    assert ways.SECONDS <= choice.seconds < ways.SECONDS + 0.9
    assert {way for way, _ in device} == {"few", "matrix", "dequantized"}  # each was timed somewhere
    assert len(device) < len(ways._points(KIND.dtype, slow))
    assert choice.ways[0] == "few"
    assert choice.ways[-1] == "dequantized"


def test_compiling_takes_nothing_of_the_time(device, monkeypatch):
    """A call that compiles takes seconds: on a fresh GPU all of them once left `matrix` untimed."""
    calls, clock = clocked(monkeypatch, 0.0)
    compiled = set()

    def compiling(way):
        def call(x, layer):
            clock[0] += 0.001 if (way, x.shape) in compiled else 3.0
            compiled.add((way, x.shape))
            return calls[way](x, layer)

        return call

    choice = ways.choice_for(KIND, {way: compiling(way) for way in COST})
    points = ways._points(KIND.dtype, calls)
    assert device == points
    assert choice.compiled == 3.0 * len(points)
    assert choice.seconds < 0.1
    assert choice.ways == [*["few"] * 4, *["matrix"] * 3, *["dequantized"] * 2]


@pytest.mark.parametrize(("rows", "expected"), [(2, 50.0), (8, 50.0), (12, 75.0), (16, 100.0), (64, 400.0)])
def test_a_time_between_two_counts_is_a_straight_line(rows, expected):
    assert ways._expected(rows, {"8": 50.0, "16": 100.0}) == expected


def test_only_possible_ways_are_timed(device, monkeypatch):
    ways.choice_for(KIND._replace(dtype=mx.float32), CALLS)
    assert {way for way, _ in device} == {"few", "dequantized"}
    device.clear()
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    ways.choice_for(KIND, CALLS)
    assert {way for way, _ in device} == {"few", "dequantized", "quantized"}
    assert max(rows for way, rows in device if way == "few") == ways.MOST_FEW


def test_four_rows_keep_the_sums_of_one(device):
    """The matrix unit rounds weights: a batch of a few would say other things than its requests alone."""
    assert not ways.is_possible("matrix", 4, mx.float16)
    assert ways.is_possible("matrix", 5, mx.float16)


def test_a_call_is_really_timed(monkeypatch):
    calls = []

    def call(x, layer):
        calls.append(layer)
        return x + 1

    us = ways._microseconds(call, mx.zeros((1, 4, 8)), ["first", "second"])
    assert us > 0
    assert calls.count("first") == calls.count("second") == ways.REPEATS * ways.CALLS // 2


def test_a_layer_to_time_leaves_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(ways, "SHAPE", (128, 64))
    mx.random.seed(3)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    layer = ways._layer(KIND, 0)
    assert mx.random.normal((4,)).tolist() == expected
    assert layer.weight.dtype == mx.uint32
    assert layer.outputs == 128


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["few"] * 9, "all few"),
        (["few"] * 2 + ["matrix"] * 4 + ["dequantized"] * 3,
         "few to 8 rows, matrix to 128, then dequantized"),
        (["few"] * 8 + ["dequantized"], "few to 512 rows, then dequantized"),
    ],
)  # fmt: skip
def test_a_choice_in_words(names, words):
    took = "timed in 1.2 s, kernels compiled and checked in 9.0 s"
    assert Choice(names, {}, 1.2, 9.0).words() == f"{words} ({took})"


def test_doctor_shows_the_choice(device, monkeypatch):
    ways.choice_for(KIND, CALLS)
    backend = Backend("cuda", "for a test", None, many_rows=ways.report)
    monkeypatch.setattr("spqt_cli.backends.select.backend", lambda: backend)
    report = doctor.examine()
    (line,) = [line for line in report.text().splitlines() if line.startswith("many rows")]
    assert "float16, 4 bits, groups of 64: few to" in line
    assert "then dequantized" in line
