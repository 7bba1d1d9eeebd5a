"""Scores of one model's predictions against the text and against another model's.

Everything is per position and in float32; sums and errors are the callers' business. It knows no models, only
logits. What has a vocabulary's width stays where it was computed: on a GPU as MLX's arrays, on the CPU as
numpy's, whose exp takes a fraction of the time of MLX's CPU build.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.measure import many_rows

Predictions = Any  # (..., vocab) float32: of numpy, or of MLX on a GPU


def log_probabilities(logits: mx.array) -> Predictions:
    """logits (..., vocab) -> their log-softmax, float32."""
    if many_rows.on_cpu():
        log_p = np.array(logits.astype(mx.float32))
        log_p -= log_p.max(axis=-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
        return log_p
    shifted = logits.astype(mx.float32)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    log_q = shifted - mx.log(mx.exp(shifted).sum(axis=-1, keepdims=True))
    mx.eval(log_q)
    return log_q


class Reference:
    """Predictions that others are held against: log_p (..., vocab), its exponential and each first choice."""

    def __init__(self, log_p: Predictions) -> None:
        """log_p: of numpy on a GPU too, as a file gives it."""
        self.log_p: Predictions = log_p if many_rows.on_cpu() else mx.array(log_p)
        self.p: Predictions = mx.exp(self.log_p) if isinstance(self.log_p, mx.array) else np.exp(log_p)
        self.best = first_choice(self.log_p)


def first_choice(log_p: Predictions) -> np.ndarray:
    """The token that each position prefers: (..., vocab) -> (...)."""
    return np.array(log_p.argmax(axis=-1))


def surprise(log_p: Predictions, targets: np.ndarray) -> np.ndarray:
    """-log p of each target token: log_p (..., vocab), targets (...) -> (...), nats."""
    if isinstance(log_p, mx.array):
        return -np.array(mx.take_along_axis(log_p, mx.array(targets)[..., None], axis=-1)[..., 0])
    return -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def divergence(reference: Reference, log_q: Predictions) -> np.ndarray:
    """KL(reference || q) per position, over the whole vocabulary: (..., vocab) -> (...), nats.

    A token without probability in the reference adds nothing, as where a model forbids it in both (-inf).
    """
    if isinstance(log_q, mx.array):
        ratio = mx.where(reference.p > 0, reference.log_p - log_q, 0.0)
        return np.array((reference.p * ratio).sum(axis=-1))
    ratio = np.zeros_like(log_q)
    np.subtract(reference.log_p, log_q, out=ratio, where=reference.p > 0)
    return np.einsum("...v,...v->...", reference.p, ratio)


@dataclass
class Against:
    """One model's predictions held against a reference's: KL in nats, over all scored positions.

    se: standard error of the mean, from the means of the windows. top1: fraction of positions where both
    prefer the same token. windows: each window's mean KL, for paired comparisons.
    """

    kl: float
    se: float
    p50: float
    p90: float
    p99: float
    top1: float
    windows: list[float]


@dataclass
class Scores:
    """Per-position results of one variant, collected window by window: each array (windows, positions)."""

    surprise: list[np.ndarray] = field(default_factory=list)
    divergence: dict[str, list[np.ndarray]] = field(default_factory=dict)
    agreement: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, log_p: Predictions, targets: np.ndarray, references: dict[str, Reference]) -> None:
        """log_p (B, T, vocab), targets (B, T); references over the same positions."""
        self.surprise.append(surprise(log_p, targets))
        best = first_choice(log_p) if references else None
        for name, reference in references.items():
            self.divergence.setdefault(name, []).append(divergence(reference, log_p))
            agrees = (reference.best == best).astype(np.float32)
            self.agreement.setdefault(name, []).append(agrees)

    def perplexity(self) -> tuple[float, float, list[float]]:
        """Perplexity, its standard error (delta method over windows), and each window's mean surprise."""
        means = np.concatenate(self.surprise).mean(axis=1)
        value = math.exp(means.mean())
        return value, value * standard_error(means), means.tolist()

    def against(self, name: str) -> Against:
        """The summary against one reference."""
        values = np.concatenate(self.divergence[name])
        means = values.mean(axis=1)
        p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
        top1 = float(np.concatenate(self.agreement[name]).mean())
        return Against(float(means.mean()), standard_error(means), p50, p90, p99, top1, means.tolist())


def standard_error(means: np.ndarray) -> float:
    """The standard error of the mean of independent windows: nan for fewer than two."""
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
