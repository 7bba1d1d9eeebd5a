"""Counts and their text; turns of requests."""

import re
import threading
import time

import pytest

from spqt_cli.serve import metrics
from spqt_cli.serve.admission import Admission
from spqt_cli.serve.refusal import ClientGone, Refusal


def test_the_text_is_what_prometheus_reads():
    text = metrics.line("x_total", "counter", "Things.", [({"a": 'q"\\\n', "b": "c"}, 2.0), ({}, 0.5)])
    assert text.splitlines() == [
        "# HELP spqt_x_total Things.",
        "# TYPE spqt_x_total counter",
        r'spqt_x_total{a="q\"\\\n",b="c"} 2',
        "spqt_x_total 0.5",
    ]
    assert re.fullmatch(
        r"# HELP .*\n# TYPE .* gauge\nspqt_y 1234567\n", metrics.line("y", "gauge", "Y.", 1234567)
    )


def decode(counts: metrics.Metrics, since: float, tokens: int, seconds: float) -> float:
    """A request's steps, `seconds` each, after a token at `since`; when the last one came."""
    for step in range(tokens):
        counts.step(since + step * seconds, since + (step + 1) * seconds)
    return since + tokens * seconds


def test_the_rate_is_of_the_last_seconds_of_decoding():
    counts = metrics.Metrics()
    assert counts.tokens_per_second() == 0
    end = decode(counts, 1000.0, 8, 0.05)
    assert counts.tokens_per_second() == pytest.approx(20)  # not of the seconds before
    end = decode(counts, end + 3600, 8, 0.05)
    assert counts.tokens_per_second() == pytest.approx(20)  # nor of those between two answers
    end = decode(counts, end, 150, 0.1)
    assert counts.tokens_per_second() == pytest.approx(10, rel=0.02)  # the answers before are forgotten


def test_requests_that_decode_together_share_their_time():
    counts = metrics.Metrics()
    for step in range(100):
        for late in (0.0, 0.001, 0.002):
            counts.step(5 + step / 20 + late, 5 + (step + 1) / 20 + late)
    assert counts.tokens_per_second() == pytest.approx(60, rel=0.01)


def test_the_skipped_share_is_the_mean_over_tokens():
    counts = metrics.Metrics()
    counts.skipped(0.5, 30)
    counts.skipped(0.1, 10)
    assert counts.skipped_share == pytest.approx(0.4)


def test_fault_75_turns_are_given_in_order_and_the_queue_has_an_end():
    admission, order = Admission(1, 3), []
    first = admission.slot(lambda: None)
    give_back = first.__enter__()

    def wait(name: int) -> None:
        with admission.slot(lambda: None):
            order.append(name)

    threads = []
    for name in range(3):
        threads.append(threading.Thread(target=wait, args=(name,)))
        threads[-1].start()
        while admission.waiting <= name:
            time.sleep(0.001)
    with pytest.raises(Refusal) as full, admission.slot(lambda: None):
        pass
    assert full.value.status == 429
    give_back()
    give_back()  # once more changes nothing
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2]
    first.__exit__(None, None, None)
    assert (admission.running, admission.waiting) == (0, 0)


def test_fault_74_one_that_gives_up_leaves_the_queue():
    admission = Admission(1, 1)

    def gone() -> None:
        raise ClientGone

    with admission.slot(lambda: None):
        with pytest.raises(ClientGone), admission.slot(gone):
            pass
        assert (admission.running, admission.waiting) == (1, 0)
    assert admission.running == 0
