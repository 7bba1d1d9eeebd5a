"""choose_experts.metal and add_experts.metal under emulation, and the check before their first use.

Contract: the experts of the largest numbers, the first of equal ones, weighed by a softmax; h and the
weighted sum, within accuracy.py's bounds; two runs are equal; the emulator reports no fault; a wrong kernel
is found.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import accuracy
from spqt_cli.backends.gpu import first_use, kernel_text, mixture
from spqt_cli.backends.gpu import launch as launching
from tests.backends.gpu.test_first_use import fresh_trust, run_emulated
from tests.backends.gpu.test_kernels import emulated

__all__ = ["emulated", "fresh_trust"]  # fixtures
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def numbers(count, dtype=mx.float32, seed=1):
    return mx.array(np.random.default_rng(seed).normal(0, 3, (1, 1, count)), dtype)


def ends(logits, width=70, chosen=4, of_all=False, dtype=None):
    return mixture.ends(mx.zeros((1, 1, width), dtype or logits.dtype), logits, chosen, of_all=of_all)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize(("count", "chosen"), [(8, 2), (8, 8), (60, 4), (128, 8), (1024, 32)])
def test_against_float64(emulated, dtype, of_all, count, chosen):
    rng = np.random.default_rng(2)
    logits = numbers(count, dtype)
    h, y = (mx.array(rng.normal(size=shape), dtype) for shape in ((1, 1, 300), (chosen, 300)))
    launches = ends(logits, 300, chosen, of_all)
    runs = []
    for _ in range(2):
        indices, weights = mixture.choose(logits, launches)
        runs.append((indices, weights, mixture.add(h, y, weights, launches)))
    assert accuracy.judge_mixture(logits, h, y, runs, of_all=of_all) == ""
    assert runs[0][2].shape == h.shape
    total = runs[0][1].sum().item()
    assert total == pytest.approx(1, rel=1e-5) if not of_all or count == chosen else 0.1 < total < 1


def test_a_router_of_another_type_than_x(emulated):
    logits = numbers(16)
    launches = ends(logits, dtype=mx.float16)
    indices, weights = mixture.choose(logits, launches)
    out = mixture.add(mx.ones((1, 1, 70), mx.float16), mx.ones((4, 70), mx.float16), weights, launches)
    assert out.dtype == mx.float16
    assert np.allclose(np.array(out), 2, atol=2e-3)
    assert sorted(indices.tolist()) == sorted(np.argsort(-np.array(logits).ravel())[:4].tolist())


def test_equal_numbers_infinity_and_nan(emulated):
    equal = mx.zeros((1, 1, 40))
    assert mixture.choose(equal, ends(equal))[0].tolist() == [0, 1, 2, 3]
    some = np.full(40, -np.inf, np.float32)
    some[[7, 30]] = 1, 2
    indices, weights = mixture.choose(mx.array(some[None, None]), ends(equal))
    assert indices.tolist() == [30, 7, 0, 1]
    assert weights.tolist() == pytest.approx([0.731058, 0.268941, 0, 0], rel=1e-5)
    some[[3, 9]] = np.nan
    indices, weights = mixture.choose(mx.array(some[None, None]), ends(equal))
    assert indices.tolist() == [3, 9, 30, 7]
    assert np.isnan(np.array(weights)).all()


def test_what_the_kernels_can_t_take():
    assert ends(numbers(7), chosen=2) is None
    assert ends(numbers(1025)) is None
    assert ends(numbers(64), chosen=33) is None
    assert ends(numbers(8), chosen=9) is None
    assert ends(numbers(64), width=7) is None


WRONG = [
    ("other > mine ||", "other >= mine ||", "other experts"),
    ("OF_ALL ? EXPERTS : CHOSEN", "EXPERTS", "weights"),
    ("] / sum", "]", "weights"),
    ("float(T(sum)) + float(h[at])", "sum", "the sum"),
    ("y[i * WIDTH + at]", "y[i + at]", "the sum"),
]


@pytest.mark.parametrize(("old", "new", "words"), WRONG)
def test_a_wrong_kernel_is_found_on_first_use(monkeypatch, fresh_trust, capfd, old, new, words):
    monkeypatch.setattr(launching, "run", run_emulated)
    x, logits = mx.zeros((1, 1, 200), mx.float16), numbers(64, mx.float16)
    assert first_use.mixture_verdict(ends(logits, 200), x, logits) == ""
    first_use._passed.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    real = kernel_text.body
    assert old in real("choose_experts.metal") + real("add_experts.metal")
    monkeypatch.setattr(kernel_text, "body", lambda name: real(name).replace(old, new))
    reason = first_use.mixture_verdict(ends(logits, 200), x, logits)
    assert words in reason
    assert "doing without this kernel" in capfd.readouterr().err
