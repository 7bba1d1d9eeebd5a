"""Texts that pass side by side: the same slopes, in order, and nothing left running."""

import threading
import time
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.fit import products, student
from spqt_cli.fit.distill import Distillation
from spqt_cli.fit.lanes import Lanes
from spqt_cli.measure import blas
from tests.fit.test_distill import distillation, made, run, slopes_of, weights

__all__ = ["made"]  # a fixture


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """As on a machine with four."""
    monkeypatch.setattr(blas, "threads", lambda: 4)


class _Lane:
    """The name and the thread of one, in the place of a lane."""

    def __init__(self, name: str) -> None:
        self.name, self.thread, self.threads = name, threading.get_ident(), None


@pytest.fixture
def lanes():
    """Three of them."""
    found = Lanes(_Lane("first"))
    names = iter(["second", "third"])
    with found.several(3, lambda: _Lane(next(names))):
        assert [lane.threads for lane in found.all] == [1, 1, 1]
        yield found
    assert len(found) == 1
    assert found.first.threads is None


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


def test_a_run_repeats_bit_for_bit(made, tmp_path, monkeypatch):
    counts = set()
    slopes = Distillation.slopes
    monkeypatch.setattr(
        Distillation,
        "slopes",
        lambda self, which, draw: counts.add(len(self._student._lanes)) or slopes(self, which, draw),
    )
    for name in ("one", "other"):
        run(made, tmp_path / name)
    assert counts == {2}, "the texts of a step pass side by side"
    assert weights(tmp_path / "one") == weights(tmp_path / "other")


def test_jobs_are_shared_out_in_order(lanes):
    found = lanes.run([lambda lane, i=i: (i, lane, threading.get_ident()) for i in range(7)])
    assert [i for i, *_ in found] == list(range(7))
    assert [lane.name for _, lane, _ in found] == ["first", "second", "third"] * 2 + ["first"]
    assert {lane.thread for _, lane, _ in found if lane.name == "first"} == {threading.get_ident()}
    assert len({lane.thread for _, lane, _ in found}) == 3
    assert all(lane.thread == thread for _, lane, thread in found), "the thread that made a lane runs it"
    assert lanes.each([lambda i=i: i for i in range(5)]) == list(range(5))


@pytest.mark.parametrize("failing", ["first", "second"])
def test_an_error_waits_for_the_others(failing, lanes):
    ended = []

    def job(lane: _Lane) -> None:
        if lane.name == failing:
            raise ValueError(failing)
        time.sleep(0.2)
        ended.append(lane)

    before = cpu.threads() if cpu.status()[0] else 0
    with pytest.raises(ValueError, match=failing):
        lanes.run([job] * 3)
    assert len(ended) == 2
    assert before == (cpu.threads() if cpu.status()[0] else 0)


def test_blas_is_limited_meanwhile(lanes, monkeypatch):
    said = []

    @contextmanager
    def limited(count):
        said.append(count)
        yield
        said.append("all")

    monkeypatch.setattr(blas, "limited", limited)
    assert lanes.run([lambda _: list(said)] * 3) == [[1]] * 3
    assert said == [1, "all"]


def test_products_by_blas_where_a_lane_has_many_threads(monkeypatch):
    """They are what ours are, to rounding."""
    rng = np.random.default_rng(0)
    dy, x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 128), (9, 40), (2, 40, 64)))
    found = [products.slopes(dy, x, w, 32, threads) for threads in (None, 1, 2, 3)]
    monkeypatch.setattr(cpu, "slopes", None)
    found.append(products.slopes(dy, x, w, 32, 4))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


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
