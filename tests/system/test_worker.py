"""Threads that outlive what they are used for."""

import subprocess
import sys
import threading

import pytest

from spqt_cli.system import worker
from spqt_cli.system.worker import workers


def test_calls_come_one_after_another_in_a_thread_of_their_own():
    with workers(2) as (one, other):
        seen: list[int] = []
        futures = [one.submit(lambda i=i: seen.append(i) or threading.get_ident()) for i in range(5)]
        threads = {future.result() for future in futures}
        assert seen == list(range(5))
        assert len(threads) == 1
        assert threads.isdisjoint({other.submit(threading.get_ident).result(), threading.get_ident()})


def test_what_a_call_raises_is_in_its_future():
    def fails() -> None:
        raise KeyError("no")

    with workers(1) as (one,):
        with pytest.raises(KeyError, match="no"):
            one.submit(fails).result()
        assert one.submit(lambda: 3).result() == 3, "the thread goes on"


def test_they_are_used_again(monkeypatch):
    monkeypatch.setattr(worker, "_idle", [])
    with workers(2) as some, workers(1) as others:
        assert not set(some) & set(others), "nobody shares one"
    before = threading.active_count()
    with pytest.raises(KeyError), workers(3) as again:
        raise KeyError
    assert set(again) == {*some, *others}
    assert threading.active_count() == before


def test_one_that_still_works_is_let_go(monkeypatch):
    monkeypatch.setattr(worker, "_idle", [])
    go = threading.Event()
    with workers(2) as (busy, free):
        waiting = busy.submit(go.wait)
    assert worker._idle == [free]
    go.set()
    assert waiting.result()


def test_a_process_ends_while_one_works():
    code = (
        "import time\nfrom spqt_cli.system.worker import workers\n"
        "with workers(1) as (one,): one.submit(lambda: time.sleep(60))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
