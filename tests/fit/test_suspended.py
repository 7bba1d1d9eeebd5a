"""Calls that wait at their layers: nothing twice, in any order, and nothing left behind."""

import gc
import weakref

import mlx.core as mx
import pytest
from mlx import nn

from spqt_cli.fit.suspended import Suspended, tap


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.calls = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        y = x + 1
        return x + self.o(self.q(y) * self.k(y))


@pytest.fixture
def block():
    made = Block()
    weights = {name: made[name].weight for name in "qko"}
    tap(made, dict.fromkeys("qko", 4))
    return made, weights


def answered(run: Suspended, weights: dict[str, mx.array], together: tuple[str, ...]) -> dict[str, mx.array]:
    paths = together if run.path in together else (run.path,)
    return {path: run.x @ weights[path].T for path in paths}


@pytest.mark.parametrize("together", [("q", "k"), ("q",)])
def test_texts_wait_for_each_other_and_compute_once(block, together):
    module, weights = block
    texts = [mx.full((2, 4), float(i)) for i in range(3)]
    runs = [Suspended(module, x) for x in texts]
    stops = []
    while any(run.path for run in runs):
        stops.append({run.path for run in runs})
        for run in runs:
            run.go_on(answered(run, weights, together))
    assert stops == ([{"q"}, {"o"}] if len(together) == 2 else [{"q"}, {"k"}, {"o"}])
    assert module.calls == len(texts)
    for x, run in zip(texts, runs, strict=True):
        y = x + 1
        expected = x + ((y @ weights["q"].T) * (y @ weights["k"].T)) @ weights["o"].T
        assert mx.allclose(run.result, expected)


def test_what_raises_inside_comes_out(block):
    module, _ = block
    run = Suspended(module, mx.ones((2, 4)))
    with pytest.raises(ValueError, match=r"shapes|broadcast"):
        run.go_on({"q": mx.ones((2, 3)), "k": mx.ones((2, 4))})


def test_closed_and_finished_calls_hold_nothing(block):
    module, weights = block
    gc.disable()
    try:
        for finish in (True, False):
            run = Suspended(module, mx.ones((2, 4)))
            while finish and run.path:
                run.go_on(answered(run, weights, ("q", "k")))
            run.close()
            seen = weakref.ref(run)
            del run
            assert seen() is None  # without the collector: no circle
    finally:
        gc.enable()


def test_a_tap_outside_gives_the_right_shape(block):
    module, _ = block
    assert module(mx.ones((2, 3, 4))).shape == (2, 3, 4)
