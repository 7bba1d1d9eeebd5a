"""What the GPU backend keeps with a layer: the arrays of a launch as one, and plans.

Contract: a layer's arrays become equal views of one array, are joined once, and other arrays or a copied
layer begin anew. No tolerance but one: float16 sums of doubled weights, 2^-11 of the result.
"""

import copy

import mlx.core as mx
import numpy as np

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, plans, settings, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from spqt_cli.format import layout
from tests.backends.gpu.test_kernels import CUTS, emulated, use

__all__ = ["emulated"]  # a fixture


def layers():
    return problems.matrices(Case((96, 160, 64), 45, group_size=32))


def dequantized(layer):
    packed = (layer.weight, layer.scales, layer.biases)
    return mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits)


def test_a_layer_s_arrays_become_equal_views():
    some, same = layers(), layers()
    found = weights.join(some)
    assert len({id(one.words) for one in found}) == 1
    for one, other, entry in zip(some, same, found, strict=True):
        for name, start in zip(("weight", "scales", "biases"), entry.starts, strict=True):
            array, expected = one[name], other[name]
            assert mx.array_equal(array, expected).item()
            assert start * 4 % weights.LINE == 0
            flat = np.array(entry.words[start : start + -(-array.nbytes // 4)]).tobytes()[: array.nbytes]
            assert flat == np.array(expected).tobytes()
        assert mx.array_equal(dequantized(one), dequantized(other)).item()


def test_layers_are_joined_once_in_any_company():
    some = layers()
    together = weights.join(some)
    packed = [one.weight for one in some]
    assert weights.join(some[1:2])[0] is together[1]  # as for one dense row
    assert weights.join(some) == together
    assert all(one.weight is weight for one, weight in zip(some, packed, strict=True))


def test_other_arrays_are_joined_anew():
    some = layers()
    before = weights.join(some)
    w = mx.random.normal((160, 45), key=mx.random.key(3)).astype(mx.float16)
    some[1].weight, some[1].scales, some[1].biases = layout.quantize(w, 4, 32, layout.band_of(160, 32))
    expected = dequantized(some[1])
    after = weights.join(some)
    assert after[0].words is not before[0].words
    assert mx.array_equal(dequantized(some[1]), expected).item()
    plan = launching.make_plan((1, 1, 45), mx.float16, some, CUTS["wide"], launching.Form())
    assert plan.inputs[1] is after[0].words


def test_a_joined_group_frees_what_it_was_made_of():
    some = problems.matrices(Case((960, 1600, 640), 450, group_size=32))
    before = mx.get_active_memory()
    weights.join(some)
    assert mx.get_active_memory() - before < 9 * weights.LINE


def test_plans_of_other_company_do_not_keep_their_copies(monkeypatch):
    use(monkeypatch, CUTS["wide"])
    monkeypatch.setattr(first_use, "verdict", lambda *_: "")
    some = problems.matrices(Case((960, 1600, 640), 450, group_size=32))
    x = problems.vector(Case((960,), 450))
    before = mx.get_active_memory()
    plans.of_row(x, some[:1], launching.Form())
    plans.of_row(x, some, launching.Form())
    numbers = 2 * 4 * settings.LEAST_NUMBERS
    assert mx.get_active_memory() - before < 9 * weights.LINE + numbers


def test_the_first_plan_of_a_fresh_group_is_kept(monkeypatch):
    use(monkeypatch, CUTS["wide"])
    monkeypatch.setattr(first_use, "verdict", lambda *_: "")
    some, x = layers(), problems.vector(Case((96,), 45))
    assert plans.of_row(x, some, launching.Form()) is plans.of_row(x, some, launching.Form())


def test_a_copied_layer_takes_no_plans_along(emulated, monkeypatch):
    use(monkeypatch, CUTS["narrow"])
    some, x = layers(), problems.vector(Case((96,), 45))
    before = gpu.sparse_gemv(x, some)
    twins = copy.deepcopy(some)
    assert not any(weights.kept(twin).joined or weights.kept(twin).plans for twin in twins)
    for twin in twins:
        twin.scales = twin.scales * 2
        twin.biases = twin.biases * 2
    after = gpu.sparse_gemv(x, twins)
    for y, twice in zip(before[0], after[0], strict=True):
        assert mx.allclose(2 * y, twice, rtol=1e-3, atol=1e-3).item()
