"""Error-compensating rounding against its definitions, and what it does with inputs that it can't use.

Errors are tr((W - Q) H (W - Q)^T): the squared change of the products, summed over all rows of inputs.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.convert.encode import NotFinite
from spqt_cli.errors import SpqtError
from spqt_cli.fit import gptq, grid, hessian_gpu
from spqt_cli.fit.hessian import Inputs, cholesky, substitute
from spqt_cli.fit.hessian_gpu import DeviceInputs
from spqt_cli.format import layout
from spqt_cli.measure import many_rows

DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def inputs_of(inputs, rows, seed=0, common=16):
    """Correlated inputs (rows, inputs) of very different sizes, as a transformer's are."""
    rng = np.random.default_rng(seed)
    own = 0.5 * rng.normal(size=(rows, inputs)) * np.exp(rng.normal(size=inputs))
    return (rng.normal(size=(rows, common)) @ rng.normal(size=(common, inputs)) + own).astype(np.float32)


def matrix(outputs, inputs, seed=1, size=0.05):
    return (np.random.default_rng(seed).normal(size=(outputs, inputs)) * size).astype(np.float32)


@pytest.fixture(params=[Inputs, DeviceInputs], ids=["host", "device"])
def kind(request):
    return request.param


def solve(w, hessian, bits=4, group_size=64, dtype=mx.float16, *, band=None, kind=Inputs, **more):
    form = gptq.Form(bits, group_size, band or layout.band_of(len(w), group_size), dtype)
    if kind is DeviceInputs:
        w, hessian = mx.array(w), mx.array(hessian.astype(np.float32))
        more |= {"cross": mx.array(more["cross"])} if "cross" in more else {}
    inputs = kind(hessian, **more)
    target = inputs.moved(w) if inputs.are_finite else w
    return gptq.solve([target], [form], inputs)[0]


def plain(w, bits=4, group_size=64, dtype=mx.float16):
    band = layout.band_of(len(w), group_size)
    return gptq.Solution(*layout.quantize(mx.array(w).astype(dtype), bits, group_size, band))


def decoded(solution, outputs, bits=4, group_size=64):
    wide = solution.scales.astype(mx.float32), solution.biases.astype(mx.float32)
    return np.array(
        layout.dequantize(solution.weight, *wide, outputs=outputs, bits=bits, group_size=group_size)
    )


def error(w, q, hessian):
    off = w.astype(np.float64) - q
    return float(np.sum((off @ hessian.astype(np.float64)) * off))


def ratio(w, solution, hessian, bits=4, group_size=64, dtype=mx.float16):
    """The error as a part of plain rounding's."""
    of_plain = error(w, decoded(plain(w, bits, group_size, dtype), len(w), bits, group_size), hessian)
    return error(w, decoded(solution, len(w), bits, group_size), hessian) / of_plain


def same(one, other):
    return all(
        mx.array_equal(getattr(one, part), getattr(other, part)) for part in ("weight", "scales", "biases")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).rpartition(".")[2])
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_error_is_far_below_plain_roundings(bits, group_size, dtype):
    x, w = inputs_of(100, 300), matrix(160, 100)
    solution = solve(w, x.T @ x, bits, group_size, dtype)
    of_plain = plain(w, bits, group_size, dtype)
    for part in ("weight", "scales", "biases"):
        assert getattr(solution, part).shape == getattr(of_plain, part).shape
        assert getattr(solution, part).dtype == getattr(of_plain, part).dtype
    assert not solution.note
    # at 8 bits the dtype of scales and biases is what limits: bfloat16 has 8 bits itself
    limit = 0.25 if bits < 6 or dtype != mx.bfloat16 else 0.5
    assert ratio(w, solution, x.T @ x, bits, group_size, dtype) < limit


def textbook(w, hessian, order):
    """GPTQ with the inverse, channel by channel, in float64: what is rounded is written back at once."""
    work = w.T[order].astype(np.float64)
    h = hessian.astype(np.float64)[np.ix_(order, order)]
    h += 0.01 * np.diagonal(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    for k in range(len(h)):
        found = grid.search(work[k].astype(np.float32).reshape(-1, 64), 4, grid.rounding(mx.float16))
        q = found.values.reshape(-1)
        work[k + 1 :] -= np.outer(upper[k, k + 1 :], (work[k] - q) / upper[k, k])
        work[k] = q
    back = np.empty_like(work)
    back[order] = work
    return back.T


@pytest.mark.parametrize("inputs", [1, 63, 130])
def test_equals_the_textbook_with_the_inverse(inputs, kind):
    x, w = inputs_of(inputs, 300), matrix(128, inputs)
    hessian = x.T @ x
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    want = textbook(w, hessian, order)
    got = decoded(solve(w, hessian, kind=kind), 128)
    # float32 sums beside float64's tip a code over now and then, and what comes after goes another way
    assert (np.abs(want - got) < 1e-6).mean() > 0.98
    assert error(w, got, hessian) == pytest.approx(error(w, want, hessian), rel=0.01)


def test_error_is_least_by_the_damped_hessian(kind):
    """It rounds for the damped Hessian: other dampings do worse by it."""
    x, w = inputs_of(96, 50), matrix(64, 96)
    hessian = (x.T @ x).astype(np.float64)
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(96)
    best = error(w, decoded(solve(w, hessian, kind=kind), 64), damped)
    for other in (0.001, 0.1, 1.0):
        assert best < 1.02 * error(w, decoded(solve(w, hessian, damping=other, kind=kind), 64), damped)


def test_target_moves_to_what_makes_up_for_other_inputs(kind):
    """S = X + X A, and alpha 1: products with X come near those of S with the matrix before."""
    rng = np.random.default_rng(5)
    x, w = inputs_of(80, 2000), matrix(64, 80)
    source = x + 0.3 * x @ (rng.normal(size=(80, 80)) / 9).astype(np.float32)
    want = source @ w.T

    def off(solution):
        return float(np.linalg.norm(x @ decoded(solution, 64, 8).T - want) / np.linalg.norm(want))

    cross = (source - x).T @ x
    still, half, all_of_it = (
        off(solve(w, x.T @ x, 8, cross=cross, alpha=alpha, ridge=1e-6, kind=kind)) for alpha in (0, 0.5, 1)
    )
    assert still > 0.05
    assert half == pytest.approx(still / 2, rel=0.05)
    assert all_of_it < 0.1 * still


def test_fewer_rows_than_inputs(kind):
    x, w = inputs_of(200, 20), matrix(64, 200)
    assert ratio(w, solve(w, x.T @ x, kind=kind), x.T @ x) < 0.05


def test_channels_that_are_always_zero_are_rounded_by_themselves(kind):
    x, w = inputs_of(70, 300), matrix(64, 70)
    x[:, [3, 50]] = 0
    solution = solve(w, x.T @ x, kind=kind)
    assert not solution.note
    assert ratio(w, solution, x.T @ x) < 0.25
    got = decoded(solution, 64)[:, [3, 50]]
    alone = grid.search(w[:, [3, 50]].T.reshape(-1, 64), 4, grid.rounding(mx.float16)).values
    np.testing.assert_array_equal(got.T, alone)
    dead = solve(w, np.zeros((70, 70), np.float32), kind=kind)
    assert not dead.note
    assert np.abs(decoded(dead, 64) - w).max() < 0.05 * np.abs(w).max() * 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite(value, kind):
    w, hessian = matrix(64, 32), np.eye(32, dtype=np.float32)
    broken = hessian.copy()
    broken[3, 5] = value
    for found in (solve(w, broken, kind=kind), solve(w, hessian, cross=broken, alpha=0.5, kind=kind)):
        assert same(found, plain(w))
        assert "finite" in found.note


def test_damping_grows_until_the_hessian_can_be_factored(kind):
    w, hessian = matrix(64, 32), np.eye(32, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 1.5  # eigenvalue -0.5: needs a damping of 0.5
    found = solve(w, hessian, kind=kind)
    assert "damping 1:" in found.note
    assert not same(found, plain(w))
    hessian[0, 1] = hessian[1, 0] = 50
    hopeless = solve(w, hessian, kind=kind)
    assert "positive definite" in hopeless.note
    assert same(hopeless, plain(w))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite(value, kind):
    w = matrix(64, 32)
    w[1, 2] = value
    with pytest.raises(NotFinite):
        solve(w, np.eye(32, dtype=np.float32), kind=kind)


def test_scales_that_do_not_fit():
    w = matrix(64, 32, size=1e6)
    with pytest.raises(SpqtError, match="do not fit float16") as raised:
        solve(w, np.eye(32, dtype=np.float32))
    assert raised.value.hint == "--dtype float32"
    assert not solve(w, np.eye(32, dtype=np.float32), dtype=mx.bfloat16).note


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e-9])
def test_constant_groups(value):
    x = inputs_of(40, 100)
    w = np.full((96, 40), value, np.float32)
    got = decoded(solve(w, x.T @ x), 96)
    assert np.abs(got - w).max() <= 2**-9 * abs(value) + 1e-7  # biases keep 11 bits, and errors add up


@pytest.mark.parametrize("outputs", [1, 40, 64, 100, 129])
def test_rows_that_fill_up_change_nothing(outputs):
    """Whole groups are what they are beside others, and the last output is repeated."""
    x, w = inputs_of(50, 200), matrix(192, 50)
    solution = solve(w[:outputs], x.T @ x, band=128)
    bands = -(-outputs // 128)
    assert solution.weight.shape == (bands, 50, 16)
    everything = decoded(solution, bands * 128)
    np.testing.assert_array_equal(
        everything[outputs:], np.repeat(everything[outputs - 1 : outputs], bands * 128 - outputs, 0)
    )
    whole = outputs // 64 * 64
    np.testing.assert_array_equal(everything[:whole], decoded(solve(w, x.T @ x), 192)[:whole])
    if outputs > 40:
        assert error(w[:outputs], everything[:outputs], x.T @ x) < 0.25 * error(
            w[:outputs], decoded(plain(w[:outputs]), outputs), x.T @ x
        )


def test_without_the_extension_the_definition_runs(monkeypatch):
    x, w = inputs_of(100, 300), matrix(64, 100)
    here = solve(w, x.T @ x)
    monkeypatch.setenv("SPQT_BACKEND", "stock")
    monkeypatch.setattr(cpu, "compensate", None)
    stock = solve(w, x.T @ x)
    assert ratio(w, stock, x.T @ x) == pytest.approx(ratio(w, here, x.T @ x), rel=0.02)
    assert same(stock, solve(w, x.T @ x))


def test_same_bits_again():
    x, w = inputs_of(150, 300), matrix(128, 150)
    assert same(solve(w, x.T @ x), solve(w, x.T @ x))


def test_matrices_of_the_same_inputs_share_what_is_computed():
    """They come out as they would alone, whatever bits, group sizes, bands and dtypes are beside them."""
    x = inputs_of(80, 300)
    forms = [
        gptq.Form(4, 64, 64, mx.float16),
        gptq.Form(4, 64, 128, mx.float16),
        gptq.Form(5, 64, 64, mx.float16),
        gptq.Form(4, 32, 64, mx.float16),
        gptq.Form(4, 64, 64, mx.bfloat16),
        gptq.Form(4, 64, 64, mx.float16),
    ]
    matrices = [matrix(rows, 80, rows) for rows in (64, 100, 64, 96, 128, 30)]
    found = gptq.solve(matrices, forms, Inputs(x.T @ x))
    for w, form, one in zip(matrices, forms, found, strict=True):
        alone = gptq.solve([w], [form], Inputs(x.T @ x))[0]
        decode = {"outputs": len(w), "bits": form.bits, "group_size": form.group_size}
        assert (decoded(one, **decode) == decoded(alone, **decode)).mean() > 0.99


def test_a_matrix_whose_scales_overflow_leaves_others_alone():
    x, w = inputs_of(80, 300), matrix(64, 80)
    form = gptq.Form(4, 64, 64, mx.float16)
    large = np.where(np.arange(80) == 7, 65000, 0).astype(np.float32) * np.sign(matrix(64, 80, 2))
    both = gptq.solve([large + w, w], [form, form], Inputs(x.T @ x))
    assert not both[1].note
    assert same(both[1], gptq.solve([w], [form], Inputs(x.T @ x))[0])


@pytest.mark.parametrize("size", [1, 256, 600])
def test_factor_and_solution_of_a_large_matrix(size):
    """Larger than a block of the factorization."""
    x = inputs_of(size, size + 50).astype(np.float64)
    a = x.T @ x + np.eye(size)
    b = np.random.default_rng(0).normal(size=(size, 3))
    lower, found = a.copy(), b.copy()
    assert cholesky(lower)
    np.testing.assert_allclose(lower @ lower.T, a, rtol=1e-9, atol=1e-9 * np.abs(a).max())
    assert not np.triu(lower, 1).any()
    substitute(lower, found)
    np.testing.assert_allclose(a @ found, b, atol=1e-8)


@pytest.mark.parametrize("size", [1, 512, 1300])
def test_factor_and_solution_on_a_device(size):
    """In float32, with a damping as in use: the factor is that of a matrix that is as good as the same."""
    x = inputs_of(size, size // 3 + 1).astype(np.float64)
    a = x.T @ x
    a += 0.01 * np.diagonal(a).mean() * np.eye(size)
    b = np.random.default_rng(0).normal(size=(size, 3))
    lower, inverses = hessian_gpu.cholesky(mx.array(a.astype(np.float32)))
    found = np.array(lower).astype(np.float64)
    assert not np.triu(found, 1).any()
    np.testing.assert_allclose(found @ found.T, a, atol=2e-6 * np.abs(a).max())
    ridged = a + np.diagonal(a).mean() * np.eye(size)
    lower, inverses = hessian_gpu.cholesky(mx.array(ridged.astype(np.float32)))
    there = np.array(hessian_gpu.substitute(lower, inverses, mx.array(b.astype(np.float32))))
    np.testing.assert_allclose(ridged @ there, b, atol=1e-3)
    assert hessian_gpu.cholesky(mx.array((a - 2 * a[0, 0] * np.eye(size)).astype(np.float32))) is None


def test_products_that_are_not_of_float32_keep_the_work_on_the_host(monkeypatch):
    monkeypatch.setattr(many_rows, "on_cpu", lambda: False)
    assert hessian_gpu.on_device()
    monkeypatch.setattr(hessian_gpu, "are_exact", lambda: False)
    assert not hessian_gpu.on_device()


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_moved_target_solves_its_equation(ridge, kind):
    x, more, w = inputs_of(300, 600), inputs_of(300, 600, seed=9), matrix(20, 300)
    hessian, cross = x.T @ x, (more - x).T @ x
    of = mx.array if kind is DeviceInputs else np.array
    moved = np.array(kind(of(hessian), of(cross), alpha=0.5, ridge=ridge).moved(of(w)))
    ridged = hessian + ridge * np.diagonal(hessian).mean() * np.eye(300)
    want = w + 0.5 * np.linalg.solve(ridged, (w.astype(np.float64) @ cross).T).T
    np.testing.assert_allclose(moved, want, atol=1e-3 * np.abs(want).max())


def test_channels_in_any_order_give_the_same_matrix():
    x, w = inputs_of(60, 300), matrix(64, 60)
    order = np.random.default_rng(3).permutation(60)
    there = decoded(solve(w[:, order], (x[:, order].T @ x[:, order])), 64)
    assert (np.abs(there - decoded(solve(w, x.T @ x), 64)[:, order]) < 1e-6).mean() > 0.98


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_search_is_nowhere_worse_than_mlx(bits, size):
    x = np.random.default_rng(0).standard_t(4, size=(200, size)).astype(np.float32)
    x[0] = 1.0
    found = grid.search(x, bits, grid.rounding(mx.float16))
    packed = mx.quantize(mx.array(x).astype(mx.float16), group_size=size, bits=bits)
    theirs = np.array(
        mx.dequantize(packed[0], *(p.astype(mx.float32) for p in packed[1:]), group_size=size, bits=bits)
    )
    assert found.codes.min() >= 0
    assert found.codes.max() <= 2**bits - 1
    np.testing.assert_array_equal(found.codes * found.scales + found.biases, found.values)
    ours, stock = (np.square(y - x).sum(-1, dtype=np.float64) for y in (found.values, theirs))
    assert ours.sum() < (0.95 if bits < 6 else 1) * stock.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).rpartition(".")[2])
def test_rounds_as_mlx_stores(dtype):
    raw = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint32)
    x = raw.view(np.float32)
    x = x[np.isfinite(x)]
    want = np.array(mx.array(x).astype(dtype).astype(mx.float32))
    np.testing.assert_array_equal(grid.rounding(dtype)(x), want)
