"""Scores of one model's predictions against the text and against another model's.

Everything is per position and in float32; sums and errors are the callers' business. It knows no
models, only logits.
"""

import math
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np


def log_probabilities(logits: mx.array) -> np.ndarray:
    """logits (..., vocab) -> their log-softmax, float32.

    By numpy, like all here: the exp of MLX's CPU build takes many times as long.
    """
    log_p = np.array(logits.astype(mx.float32))
    log_p -= log_p.max(axis=-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    return log_p


class Reference:
    """Predictions that others are held against: log_p (..., vocab) and its exponential."""

    def __init__(self, log_p: np.ndarray) -> None:
        self.log_p, self.p = log_p, np.exp(log_p)


def surprise(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of each target token: log_p (..., vocab), targets (...) -> (...), nats."""
    return -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def divergence(reference: Reference, log_q: np.ndarray) -> np.ndarray:
    """KL(reference || q) per position, over the whole vocabulary: (..., vocab) -> (...), nats.

    A token without probability in the reference adds nothing, as where a model forbids it in both (-inf).
    """
    ratio = np.zeros_like(log_q)
    np.subtract(reference.log_p, log_q, out=ratio, where=reference.p > 0)
    return np.einsum("...v,...v->...", reference.p, ratio)


def agreement(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """1.0 where both prefer the same token: (..., vocab) each -> (...)."""
    return (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).astype(np.float32)


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

    def add(self, log_p: np.ndarray, targets: np.ndarray, references: dict[str, Reference]) -> None:
        """log_p (B, T, vocab), targets (B, T); references over the same positions."""
        self.surprise.append(surprise(log_p, targets))
        for name, reference in references.items():
            self.divergence.setdefault(name, []).append(divergence(reference, log_p))
            self.agreement.setdefault(name, []).append(agreement(reference.log_p, log_p))

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
