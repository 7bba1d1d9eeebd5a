"""Which allocations a method measures, by a stand-in for the measurements."""

import numpy as np
import pytest

from spqt_cli.calibrate import methods
from spqt_cli.calibrate.gradients import SPARSITIES
from spqt_cli.calibrate.measurements import Candidate
from spqt_cli.calibrate.methods import METHODS, PAPER, STREAMED_METHODS, UNIFORM
from spqt_cli.decode.layers import ZigzagLinear, nn
from spqt_cli.errors import UnsupportedError


class StandIn:
    """Measurements that only note what they are asked."""

    def __init__(self, gradients: bool = True) -> None:
        self.layers = {"one": ZigzagLinear.from_linear(nn.Linear(64, 32, bias=False), 32, 4)}
        self.counts: dict[str, np.ndarray] = {}
        self.gradients, self.asked = gradients, []

    def sensitivities(self, windows):
        self.asked.append(windows)
        if not self.gradients:
            raise UnsupportedError("this model has no gradients", "use --method uniform")
        return {"one": np.linspace(0, 1, len(SPARSITIES)) ** 2}

    def measured(self, allocations, sparsity, effort):
        self.asked.append((tuple(one.name for one in allocations), sparsity, effort))
        return [Candidate(one.name, {}, note=one.note) for one in allocations]


def names(table: str, method: str, sparsity: float = 0.4, gradients: bool = True) -> list:
    stand_in, chosen = StandIn(gradients), getattr(methods, table)[method]
    methods.candidates(stand_in, chosen, sparsity)
    assert stand_in.asked[-1][1:] == (sparsity, chosen.effort)
    return [*stand_in.asked[:-1], *stand_in.asked[-1][0]]


@pytest.mark.parametrize(
    ("table", "method", "expected"),
    [
        ("METHODS", "uniform", ["uniform"]),
        ("METHODS", "paper", ["paper"]),
        ("METHODS", "fast", [2, "gradient"]),
        ("METHODS", "auto", [6, "uniform", "gradient"]),
        ("STREAMED_METHODS", "uniform", ["uniform"]),
        ("STREAMED_METHODS", "paper", ["paper"]),
        ("STREAMED_METHODS", "fast", [4, "gradient"]),
    ],
)
def test_allocations_of_each_method(table, method, expected):
    assert names(table, method) == expected


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_skip_needs_no_search(method):
    assert names("METHODS", method, 0.0) == ["uniform"]


def test_streamed_methods_take_one_pass():
    for method in STREAMED_METHODS.values():
        assert len(method.allocations) == 1
        assert method.effort.second_windows == 0


def test_without_gradients_auto_measures_uniform_alone_and_says_so():
    (found,) = methods.candidates(StandIn(gradients=False), METHODS["auto"], 0.4)
    assert found.name == "uniform"
    assert found.note == "this model has no gradients; so all layers have the same sparsity"
    with pytest.raises(UnsupportedError):
        methods.candidates(StandIn(gradients=False), METHODS["fast"], 0.4)


def test_an_allocation_that_needs_a_search_has_no_sparsities():
    assert PAPER.sparsities is None
    assert UNIFORM.over(["one"])["one"][20] == 0.4
