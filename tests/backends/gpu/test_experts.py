"""sparse_experts.metal under emulation: few rows, each through the experts chosen for it.

Contract: each pair's y is matmul(mask(x, threshold), W) of its expert within accuracy.py's bound, counts are
exact, two runs are equal bit for bit, the emulator reports no fault; a wrong kernel is found on first use.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import accuracy, problems, stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import experts, first_use, geometry, plans, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from spqt_cli.format import layout
from tests.backends.gpu.test_first_use import fresh_trust, planted, run_emulated  # noqa: F401 - a fixture
from tests.backends.gpu.test_kernels import CUTS, emulated  # noqa: F401 - a fixture

COUNT = 3
CHOSEN = ((2, 0), (1, 1))  # of two rows


def use(monkeypatch, cut):
    monkeypatch.setattr(geometry, "choose_experts", lambda *_: cut)


def assert_right(case, x, indices):
    """x: (rows, 1, 1, inputs), or (rows, chosen, 1, inputs)."""
    alone, stacks = problems.experts(case, COUNT)
    step = gpu.prepare_experts(stacks)
    nothing = mx.zeros((len(stacks),), mx.uint32)
    results = [step(x, indices, nothing) for _ in range(2)]
    wide = mx.broadcast_to(x, (*indices.shape, 1, case.inputs))
    total = np.zeros(len(stacks), np.int64)
    for at in np.ndindex(*indices.shape):
        some = alone[indices[at].item()]
        row = wide[at].reshape(1, 1, -1)
        kept = [kept_of(row, one) for one in some]
        counts = mx.array(kept, mx.uint32)
        first, second = (([y[at] for y in ys], counts) for ys, _ in results)
        found = accuracy.judge(row, some, first, second)
        assert found.passed, (at, found.words())
        total += kept
    for _, counted in results:
        assert counted.tolist() == total.tolist()


def kept_of(row, matrix):
    return int((~(np.abs(accuracy.wide(row).ravel()) < float(matrix.threshold.item()))).sum())


def both_inputs(case):
    """One row for all experts of a token, as gate and up have it; a row for each, as down has it."""
    rows = problems.rows(case, 4).reshape(4, case.inputs)
    return rows[:2].reshape(2, 1, 1, -1), rows.reshape(2, 2, 1, -1)


@pytest.mark.parametrize("bits", layout.BITS)
def test_every_width_of_code(emulated, monkeypatch, bits):  # noqa: F811
    use(monkeypatch, CUTS["wide"]._replace(stripe=333))
    case = Case((500,), 333, bits)
    for x in both_inputs(case):
        assert_right(case, x, mx.array(CHOSEN, mx.uint32))


@pytest.mark.parametrize("cut", ["wide", "ragged", "across simdgroups"])
def test_cuts_gate_and_up_and_bands_not_full(emulated, monkeypatch, cut):  # noqa: F811
    use(monkeypatch, CUTS[cut]._replace(stripe=257))
    case = Case((700, 321), 257, 4, band=320)
    assert_right(case, both_inputs(case)[0], mx.array(CHOSEN, mx.uint32))
    assert [one.kernel.name.split("_")[1] for one in emulated] == ["experts"] * 2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("kind", ["cuda", "g"])
def test_with_the_rule_of_a_device(emulated, monkeypatch, kind, dtype):  # noqa: F811
    monkeypatch.setattr(plans, "device_class", lambda: kind)
    monkeypatch.setattr(first_use, "experts_verdict", lambda *_: "")
    case = Case((1024, 1024), 96, dtype=dtype)
    assert_right(case, both_inputs(case)[0], mx.array(CHOSEN, mx.uint32))


@pytest.fixture(autouse=True)
def _trusted(monkeypatch, request):
    if "fresh_trust" not in request.fixturenames:
        monkeypatch.setattr(first_use, "experts_verdict", lambda *_: "")


def test_biases_of_each_expert_and_an_index_without_one(emulated, monkeypatch):  # noqa: F811
    use(monkeypatch, CUTS["narrow"]._replace(stripe=96))
    case = Case((100,), 96, dtype=mx.float32)
    _, (stack,) = problems.experts(case, COUNT)
    stack.bias = mx.random.normal((COUNT, 100), key=mx.random.key(5))
    x, indices = both_inputs(case)[0], mx.array([[2, 0], [1, 7]], mx.uint32)
    (y,), counted = gpu.prepare_experts([stack])(x, indices, None)
    assert counted is None
    known = mx.array([[2, 0], [1, 1]], mx.uint32)
    (wanted,), _ = stock.prepare_experts([stack])(x, known, None)
    assert mx.allclose(y[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert mx.allclose(y[1, 0], wanted[1, 0], rtol=1e-4, atol=1e-4)
    assert mx.isnan(y[1, 1]).all()


def test_a_plan_is_made_once_and_again_for_another_threshold(emulated, monkeypatch):  # noqa: F811
    use(monkeypatch, CUTS["narrow"]._replace(stripe=96))
    made = []
    make = experts.make_plan
    monkeypatch.setattr(experts, "make_plan", lambda *given: made.append(given) or make(*given))
    case = Case((100,), 96)
    _, stacks = problems.experts(case, COUNT)
    x, indices = both_inputs(case)[0], mx.array(CHOSEN, mx.uint32)
    for _ in range(2):
        gpu.prepare_experts(stacks)(x, indices, None)
    assert len(made) == 1
    stacks[0].set_threshold(0.5)
    gpu.prepare_experts(stacks)(x, indices, None)
    assert len(made) == 2


def test_layers_that_differ_take_mlx_s_own_product(emulated, monkeypatch):  # noqa: F811
    use(monkeypatch, CUTS["narrow"]._replace(stripe=96))
    _, (one,) = problems.experts(Case((100,), 96), COUNT)
    _, (other,) = problems.experts(Case((100,), 96, bits=8), COUNT)
    x, indices = both_inputs(Case((100,), 96))[0], mx.array(CHOSEN, mx.uint32)
    ys, _ = gpu.prepare_experts([one, other])(x, indices, None)
    wanted, _ = stock.prepare_experts([one, other])(x, indices, None)
    assert all(mx.array_equal(a, b) for a, b in zip(ys, wanted, strict=True))
    assert emulated == []


def test_tiles_are_narrower_where_there_are_few_pairs():
    few = geometry.choose_experts("cuda", [(1024, 1), (1024, 1)], 2048, 8)
    many = geometry.choose_experts("cuda", [(1024, 1), (1024, 1)], 2048, 512)
    assert few.lanes < many.lanes == geometry.choose("cuda", [(1024, 1), (1024, 1)], 2048).lanes
    assert few.lanes >= geometry.FEWEST_LANES
    assert few.stripes(2048) == many.stripes(2048) == 1
    for kind in ("cuda", "p", "g", "s", "d"):
        for outputs in (96, 768, 1408, 2880, 7168):
            for pairs in (1, 8, 512):
                cut = geometry.choose_experts(kind, [(layout.band_of(outputs, 32), 1)], 7168, pairs)
                assert cut.threads <= 1024
                assert cut.list % cut.threads == 0
                assert cut.list <= 32 * cut.threads


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pair / each", "0"),
        ("ulong(expert) * bands", "ulong(0) * bands"),
        ("(ulong(expert) * bands + band_index)", "(ulong(expert) + band_index)"),
        ("active + pair * P", "active"),
    ],
)
def test_a_wrong_kernel_is_found_on_first_use(monkeypatch, fresh_trust, capfd, old, new):  # noqa: F811
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["narrow"]._replace(stripe=301))
    mx.disable_compile()
    try:
        _, stacks = problems.experts(Case((128, 128), 301), COUNT)
        x, indices = problems.rows(Case((128,), 301), 2).reshape(2, 1, 1, -1), mx.array(CHOSEN, mx.uint32)
        assert plans.of_experts(x, indices, stacks) is not None
        first_use._passed.cache_clear()
        planted(monkeypatch, old, new)
        weights.kept(stacks[0]).forget()
        assert plans.of_experts(x, indices, stacks) is None
    finally:
        mx.enable_compile()
    assert "a GPU kernel is wrong" in capfd.readouterr().err
