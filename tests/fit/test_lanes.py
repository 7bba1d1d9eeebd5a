"""Texts that pass side by side: the same slopes, in order, and nothing left running."""

import threading
import time

import mlx.core as mx
import pytest

from spqt_cli.backends import cpu
from spqt_cli.fit import student
from spqt_cli.fit.lanes import Lanes
from spqt_cli.measure import blas
from tests.fit.test_distill import distillation, made, run, slopes_of, weights

__all__ = ["made"]  # a fixture


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """As on a machine with four."""
    monkeypatch.setattr(blas, "threads", lambda: 4)


@pytest.fixture
def lanes():
    """Three, which are names here."""
    found = Lanes("first")
    names = iter(["second", "third"])
    with found.several(3, lambda: f"{next(names)} {threading.get_ident()}"):
        yield found
    assert len(found) == 1


@pytest.mark.parametrize("texts", [2, 4])
@pytest.mark.parametrize("limit", [None, 0])
def test_slopes_are_those_of_one_lane(texts, limit, made, tmp_path, monkeypatch):
    """limit: bytes of what is held or kept, and of texts that pass together."""
    alone = distillation(made, made / "model", tmp_path / "one")
    want = slopes_of(alone, [4, 2, 7])
    if limit is not None:
        for name in ("HELD_BYTES", "KEPT_BYTES", "CHUNK_BYTES"):
            monkeypatch.setattr(student, name, {"cpu": limit})
    together = distillation(made, made / "model", tmp_path / "two")
    with together._student.side_by_side(texts) as count:
        assert count == texts
        assert len(together._student._lanes) == texts
        found = slopes_of(together, [4, 2, 7])
    assert len(together._student._lanes) == 1
    assert found.keys() == want.keys()
    for name, slope in want.items():
        assert mx.allclose(found[name], slope, rtol=1e-3, atol=2e-4 * float(mx.abs(slope).max())), name


def test_no_more_lanes_than_cores(made, tmp_path, monkeypatch):
    monkeypatch.setattr(blas, "threads", lambda: 1)
    training = distillation(made, made / "model", tmp_path)
    with training._student.side_by_side(2) as count:
        assert count == 1


def test_a_run_repeats_bit_for_bit(made, tmp_path):
    for name in ("one", "other"):
        run(made, tmp_path / name)
    assert weights(tmp_path / "one") == weights(tmp_path / "other")


def test_jobs_are_shared_out_in_order(lanes):
    found = lanes.run([lambda lane, i=i: (i, lane, threading.get_ident()) for i in range(7)])
    assert [i for i, *_ in found] == list(range(7))
    assert [lane.split()[0] for _, lane, _ in found] == ["first", "second", "third"] * 2 + ["first"]
    assert {thread for _, lane, thread in found if lane == "first"} == {threading.get_ident()}
    for _, lane, thread in found[1:3]:
        assert lane.endswith(str(thread)), "the thread that made a lane runs it"
    assert lanes.each([lambda i=i: i for i in range(5)]) == list(range(5))


@pytest.mark.parametrize("failing", ["first", "second"])
def test_an_error_waits_for_the_others(failing, lanes):
    ended = []

    def job(lane: str) -> None:
        if lane.startswith(failing):
            raise ValueError(failing)
        time.sleep(0.2)
        ended.append(lane)

    with pytest.raises(ValueError, match=failing):
        lanes.run([job] * 3)
    assert len(ended) == 2


@pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
def test_each_has_its_part_of_the_threads(lanes):
    before = cpu.threads()
    cpu.set_threads(6)
    try:
        assert lanes.run([lambda _: cpu.threads()] * 3) == [2, 2, 2]
        assert lanes.run([lambda _: cpu.threads()]) == [6], "one job has them all"
        assert cpu.threads() == 6
    finally:
        cpu.set_threads(before)
