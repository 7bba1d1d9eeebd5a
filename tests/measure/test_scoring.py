"""Scores against definitions in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.measure import many_rows, scoring


@pytest.fixture(params=["numpy", "mlx"], autouse=True)
def by(request, monkeypatch):
    """Both ways; MLX's, a GPU's, on the CPU device here."""
    monkeypatch.setattr(many_rows, "on_cpu", lambda: request.param == "numpy")
    return request.param


def logits(seed: int, shape=(2, 5, 11), scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def softmax64(values: np.ndarray) -> np.ndarray:
    p = np.exp(values - values.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def log_p(values: np.ndarray) -> np.ndarray:
    return scoring.log_probabilities(mx.array(values, mx.float32))


def test_scores_against_float64():
    a, b, targets = logits(0), logits(1), np.random.default_rng(2).integers(0, 11, (2, 5))
    p, q = softmax64(a), softmax64(b)
    scores = scoring.Scores()
    scores.add(log_p(b), targets, {"a": scoring.Reference(log_p(a))})
    kl = (p * np.log(p / q)).sum(axis=-1)
    nll = -np.log(np.take_along_axis(q, targets[..., None], -1))[..., 0]
    against, (ppl, se, windows) = scores.against("a"), scores.perplexity()
    # float32: about 1e-6 relative for 11 terms of order one
    assert against.kl == pytest.approx(kl.mean(), rel=1e-5)
    assert against.windows == pytest.approx(kl.mean(axis=1), rel=1e-5)
    assert against.p90 == pytest.approx(np.percentile(kl, 90), rel=1e-5)
    assert against.top1 == (a.argmax(-1) == b.argmax(-1)).mean()
    assert ppl == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert windows == pytest.approx(nll.mean(axis=1), rel=1e-5)
    assert se == pytest.approx(ppl * nll.mean(axis=1).std(ddof=1) / math.sqrt(2), rel=1e-4)


def test_same_predictions_have_no_divergence():
    scores = scoring.Scores()
    a = log_p(logits(3))
    scores.add(a, np.zeros((2, 5), int), {"a": scoring.Reference(a)})
    assert scores.against("a").kl == 0
    assert scores.against("a").top1 == 1


def test_huge_logits_stay_finite(by):
    values = logits(4) * 1e4
    found = log_p(values)
    assert isinstance(found, np.ndarray if by == "numpy" else mx.array)
    assert np.isfinite(np.array(found)).all()


def test_predictions_read_from_a_file():
    a = log_p(logits(3))
    reference = scoring.Reference(np.array(a))  # of numpy, wherever it is used
    assert scoring.divergence(reference, a) == pytest.approx(0, abs=0)
    assert np.array_equal(reference.best, logits(3).argmax(-1))


def test_one_window_has_no_standard_error():
    assert math.isnan(scoring.standard_error(np.array([1.0])))


def test_tokens_that_both_models_forbid_add_nothing_to_kl():
    """As mlx-lm's phi3small does with unused tokens: 0 times (-inf less -inf) is 0 here."""
    a, b = logits(0), logits(1)
    a[..., 3] = b[..., 3] = -np.inf
    found = scoring.divergence(scoring.Reference(log_p(a)), log_p(b))
    p, q = (np.delete(softmax64(each), 3, axis=-1) for each in (a, b))
    assert found == pytest.approx((p * np.log(p / q)).sum(axis=-1), rel=1e-4)  # float32, differences of logs


def test_token_that_only_the_other_model_forbids_is_infinitely_far():
    a, b = logits(0), logits(1)
    b[..., 3] = -np.inf
    assert np.isposinf(scoring.divergence(scoring.Reference(log_p(a)), log_p(b))).all()
