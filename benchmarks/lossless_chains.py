"""Chains of drafts, each by the same weights with more channels skipped, for all positions of a text at once.

A draft reads the cache of the dense rows before its chain, and the sparse entries of the drafts before it in
the chain. A stream of rows for each place in a chain computes that in one pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from spqt_cli.decode import foreign
from spqt_cli.errors import UnsupportedError
from spqt_cli.measure import many_rows, probes, scoring
from spqt_cli.measure.attention import from_host, host

# Under which a draft is accepted: rule -> as text.
RULES = {"greedy": "first choice equal", "min": "min(1, p/q)", "equal": "sampled equal"}


class Window(NamedTuple):
    """Tokens of a text; those before `split` are a dense prompt, the others are drafted for."""

    tokens: Sequence[int]
    split: int


@contextmanager
def chained(prompt: int) -> Iterator[None]:
    """In this block attention of streams (1 + drafts, ...) is that of chains of drafts.

    Stream 0 is dense. A query of stream s at position t sees, of the s positions up to t, the keys of streams
    1 to s, and before them those of stream 0. prompt: positions before the queries, equal in all streams.
    """

    def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, **others: Any) -> mx.array:
        if others.pop("mask") != "causal" or any(value is not None for value in others.values()):
            raise UnsupportedError(
                "attention has masks or sinks of its own", "measure a model of plain causal attention"
            )
        queries, keys, values = host(q) * np.float32(scale), host(k), host(v)
        streams, _, count, width = queries.shape
        grouped = queries.reshape(streams, keys.shape[1], -1, count, width)
        y = np.empty_like(grouped)
        later = np.triu(np.full((count, prompt + count), -np.inf, np.float32), prompt + 1)
        for stream in range(streams):
            for head in range(keys.shape[1]):
                rows = grouped[stream, head]
                y[stream, head] = _chain(rows, keys[:, head], values[:, head], later, stream)
        return from_host(y.reshape(q.shape)).astype(q.dtype)

    with foreign.replaced([(mx.fast, "scaled_dot_product_attention", attend)]):
        yield


def _chain(rows: np.ndarray, keys: np.ndarray, values: np.ndarray, later: np.ndarray, stream: int) -> Any:
    """Attention of one stream and head of keys: rows (repeats, count, D), keys and values (streams, length,
    D), later (count, length) -> (repeats, count, D).
    """
    count, prompt = later.shape[0], later.shape[1] - later.shape[0]
    scores = rows @ keys[0].T + later
    for back in range(stream):
        at = np.arange(back, count)
        own = keys[stream - back, prompt : prompt + count - back]
        scores[:, at, prompt + at - back] = np.einsum("rnd,nd->rn", rows[:, back:], own)
    scores -= scores.max(axis=-1, keepdims=True)
    p = np.exp(scores)
    p /= p.sum(axis=-1, keepdims=True)
    y = p @ values[0]
    for back in range(stream):
        at = np.arange(back, count)
        part = slice(prompt, prompt + count - back)
        y[:, back:] += p[:, at, prompt + at - back][..., None] * (values[stream - back] - values[0])[part]
    return y


def logits(
    model: Any, harness: probes.Harness, masking: probes.Masking, window: Window, drafts: int
) -> mx.array:
    """Logits (1 + drafts, positions, vocab) after each token but the last, from the split on: dense, then as
    the first draft of a chain has them there, the second, and so on.
    """
    tokens, split = window
    cache = probes.prompt_cache(model, mx.array([tokens[:split]]))
    for entry in cache:
        entry.keys, entry.values = (
            mx.repeat(array, 1 + drafts, axis=0) for array in (entry.keys, entry.values)
        )
    streams = np.repeat(np.array([tokens[split:-1]]), 1 + drafts, axis=0)
    rows = np.ones(streams.shape, bool)
    rows[0] = False
    with many_rows.many_rows(), chained(split), harness.masked(masking, rows):
        found: mx.array = model(mx.array(streams), cache=cache)
        mx.eval(found)
        masking.evaluate()
    return found


def accepted(of_streams: mx.array) -> dict[str, np.ndarray]:
    """By rule, (drafts, positions): the probability that a draft is accepted, given those before it."""
    dense = np.exp(scoring.log_probabilities(of_streams[0]))
    found: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    for one in of_streams[1:]:
        sparse = np.exp(scoring.log_probabilities(one))
        found["greedy"].append((dense.argmax(-1) == sparse.argmax(-1)).astype(np.float32))
        found["min"].append(np.minimum(dense, sparse).sum(-1))
        found["equal"].append((dense * sparse).sum(-1))
    return {rule: np.stack(values) for rule, values in found.items()}


def means(chance: np.ndarray) -> list[float]:
    """Of 1, 2, ... drafts a step, how many are accepted on average.

    chance: (drafts, positions) of one window, as `accepted` gives them. A chain begins at every position from
    which all its drafts lie in the window.
    """
    drafts, positions = chance.shape
    chains = positions - drafts + 1
    reached = np.cumprod([chance[i, i : i + chains] for i in range(drafts)], axis=0)
    return np.cumsum(reached.mean(axis=1)).tolist()
