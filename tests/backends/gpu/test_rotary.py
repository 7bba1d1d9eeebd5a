"""reduce_stripes.metal where it turns heads by their position (ROTATED), under emulation.

Contract: heads of q and k are turned as rotary embeddings turn them, however tiles, bands and heads lie; v is
left as it is. The bound is accuracy.judge_rotary's: the two products of a pair and their sum are rounded in
float32, the result once more to x's dtype.
"""

import mlx.core as mx
import pytest

from spqt_cli.backends import accuracy, problems
from spqt_cli.backends.gpu import first_use, kernel_text, plans
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.interface import Rotary
from tests.backends.gpu.test_first_use import fresh_trust, run_emulated
from tests.backends.gpu.test_kernels import CUTS, DTYPES, emulated, use

Case = problems.Case
__all__ = ["emulated", "fresh_trust"]  # fixtures
STRIPED = [name for name, cut in CUTS.items() if cut.stripes(301) > 1]
FORMS = {
    "halves": Rotary(64, 64, traditional=False, rotated=2),
    "neighbours": Rotary(64, 64, traditional=True, rotated=2),
    "partly": Rotary(96, 40, traditional=False, rotated=2),
    "wide head": Rotary(256, 256, traditional=False, rotated=1),
}


def turned(case, form, cut):
    """What is wrong with the turned heads of a case."""
    layers, x = problems.matrices(case), problems.vector(case)
    assert launching.turns(layers, form)
    apart = first_use._result(x, launching.make_plan(x.shape, x.dtype, layers, cut, launching.Form()))
    plan = launching.make_plan(x.shape, x.dtype, layers, cut, launching.Form(then=form))
    angles = mx.random.uniform(0.0, 6.0, (form.dims // 2,), key=mx.random.key(3))
    turns = mx.concatenate([mx.cos(angles), mx.sin(angles)])
    found = first_use._result(x, plan, turns)
    assert [y.shape for y in found[0]] == [(1, n // form.head, 1, form.head) for n in case.outputs]
    return accuracy.judge_rotary(apart, turns, found, form)


@pytest.mark.parametrize("cut", STRIPED)
@pytest.mark.parametrize("form", FORMS)
def test_turned_heads_of_every_cut(emulated, cut, form):
    head = FORMS[form].head
    case = Case((head * 6, head * 2, head * 2), 301, bias=form == "neighbours", band=head * 2)
    assert turned(case, FORMS[form], CUTS[cut]) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turned_heads_of_every_dtype(emulated, dtype):
    assert turned(Case((256, 128, 128), 301, dtype=dtype), FORMS["halves"], CUTS["wide"]) == ""


def test_heads_across_bands_and_odd_widths_are_not_turned():
    layers = problems.matrices(Case((192, 64), 70, band=64))
    assert not launching.turns(layers, Rotary(128, 128, traditional=False, rotated=2))
    assert not launching.turns(layers, Rotary(64, 4, traditional=False, rotated=2))
    assert not launching.turns(layers, Rotary(64, 63, traditional=False, rotated=2))
    assert not launching.turns(layers, Rotary(64, 128, traditional=False, rotated=2))
    assert launching.turns(layers, Rotary(64, 32, traditional=False, rotated=2))


@pytest.mark.parametrize("wrong", ["leads ? -its : its", "held -= held", "const bool owns ="])
def test_a_wrong_turn_is_found_on_first_use(monkeypatch, fresh_trust, capfd, wrong):
    better = {
        "leads ? -its : its": "its",
        "held -= held": "held -= 0 * held",
        "const bool owns =": "const bool owns = false &&",
    }
    real = kernel_text.body
    monkeypatch.setattr(kernel_text, "body", lambda name: real(name).replace(wrong, better[wrong]))
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["eight lanes"])
    case = Case((128, 64), 301)
    layers, x = problems.matrices(case), problems.vector(case)
    assert plans.of_row(x, layers, launching.Form(then=FORMS["halves"])).gemv is None
    assert "a GPU kernel is wrong" in capfd.readouterr().err
    assert first_use.refused()
