"""Running counts: on from step to step, past what one uint32 holds, merged where a layer ran in two ways."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import mlx.core as mx
import pytest

from spqt_cli.decode import active_counts


def groups(*sizes):
    return [SimpleNamespace(layers=[SimpleNamespace(inputs=10) for _ in range(size)]) for size in sizes]


def count(tally, *active):
    """One step in which so many channels were active, per group and layer."""
    tally.keep([b + mx.array(a, mx.uint32) for a, b in zip(active, tally.running, strict=True)])


def test_counts_of_several_groups_are_means_over_steps():
    both = groups(2, 1)
    with active_counts.counting() as counter:
        count(counter.tally(both), [1, 2], [5])
        count(counter.tally(both), [3, 4], [5])
    assert [share for _, share in counter.densities()] == pytest.approx([0.2, 0.3, 0.5])


def test_counts_go_on_past_the_longest_run(monkeypatch):
    monkeypatch.setattr(active_counts.Tally, "LONGEST", 3)
    one = groups(1)
    with active_counts.counting() as counter:
        for step in range(1, 8):
            tally = counter.tally(one)
            count(tally, [step])
            assert (tally.running[0].tolist() == [0]) is (step % 3 == 0)
            (row,) = counter.densities()
            assert row[1] == pytest.approx(sum(range(1, step + 1)) / step / 10)


def test_a_layer_that_ran_in_two_ways_has_one_row():
    (alone,) = groups(1)
    with active_counts.counting() as counter:
        count(counter.tally([alone]), [2])
        way = [alone, *groups(1)]
        count(counter.tally(way), [4], [1])
        count(counter.tally(way), [6], [1])
    assert {id(layer): share for layer, share in counter.densities()}[id(alone.layers[0])] == pytest.approx(
        0.4
    )


def test_counting_ends_with_its_block_and_nests():
    with active_counts.counting() as outer:
        with active_counts.counting() as inner:
            assert active_counts.current() is inner
        assert active_counts.current() is outer
    assert active_counts.current() is None


def test_only_some_steps_are_counted():
    both, each = groups(1, 1), []
    with active_counts.counting(every=3) as counter:
        for step in range(7):
            tally = counter.tally(both)
            each.append(tally is not None)
            if tally is not None:
                count(tally, [step], [1])
    assert each == [True, False, False, True, False, False, True]
    assert [share for _, share in counter.densities()] == pytest.approx([(0 + 3 + 6) / 3 / 10, 0.1])


def test_rows_of_a_step_are_told_apart_by_their_requests():
    """Two requests, then a third beside them, then one of them alone: 8 rows in 4 steps."""
    one = groups(1)
    with active_counts.counting() as counter:
        for requests, steps in (
            (("a", "b"), [([2, 4], 5), ([4, 4], 6)]),
            (("b", "c", "a"), [([1, 3, 9], 10)]),
            (("b",), [([7], 7)]),
        ):
            for active, read in steps:
                with active_counts.rows_of(requests):
                    tally = counter.tally(one, len(active))
                count(tally, [active] if len(active) == 1 else [[*active, read]])
    assert counter.requests() == ["a", "b", "c"]
    found = {request: counter.shares(request)[0] for request in counter.requests()}
    assert {key: share.active for key, share in found.items()} == pytest.approx(
        {"a": (2 + 4 + 9) / 30, "b": (4 + 4 + 1 + 7) / 40, "c": 3 / 10}
    )
    assert {key: share.read for key, share in found.items()} == pytest.approx(
        {"a": (5 + 6 + 10) / 30, "b": (5 + 6 + 10 + 7) / 40, "c": 10 / 10}
    )
    (together,) = counter.shares()
    assert together.active == pytest.approx((2 + 4 + 4 + 4 + 1 + 3 + 9 + 7) / 80)
    assert together.read == pytest.approx((5 + 6 + 10 + 7) / 40)
    assert counter.shares("d") == []


def test_a_matrix_that_eight_rows_each_read_again_counts_once():
    one = groups(1)
    with active_counts.counting() as counter:
        count(counter.tally(one, 9), [[*[10] * 9, 20]])
    (share,) = counter.shares()
    assert (share.active, share.read) == (1.0, 1.0)


def test_a_loop_that_ends_late_leaves_another_s_counter():
    def left() -> Iterator[None]:
        with active_counts.counting():
            yield

    unfinished = left()
    next(unfinished)
    with active_counts.counting() as counter:
        unfinished.close()
        assert active_counts.current() is counter
    assert active_counts.current() is None


def test_threads_count_apart():
    """A server decodes in a thread of its own."""
    seen = []
    with active_counts.counting() as counter:
        thread = threading.Thread(target=lambda: seen.append(active_counts.current()))
        thread.start()
        thread.join()
        assert active_counts.current() is counter
    assert seen == [None]
