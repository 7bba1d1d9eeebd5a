"""Text that a model writes itself: what it is fitted on where there is no other.

A plain loop over mlx-lm's model and cache, one token of every text a step. mlx-lm's BatchGenerator pads
starts and keeps an offset for each text, so that its caches need masks and its rotary positions offsets too.
Here they need neither: all texts begin at position 0, and short starts sample on while longer ones are fed.
Sampling is at temperature 1, and no token ends a text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
from mlx import nn

from spqt_cli.decode import context
from spqt_cli.errors import SpqtError
from spqt_cli.fit import starts
from spqt_cli.measure import many_rows, many_texts

OnProgress = Callable[[float, float, str], None]
AT_ONCE = 128  # texts
CACHE_FRACTION = 0.125  # of the machine's memory, for the cache of texts written at once
FEW_KINDS = 0.15  # of a text's first 256 tokens: one with fewer different ones repeats itself
LOOKED_AT = 256  # tokens
TRIES = 3  # rounds in which such texts are written anew
_BLOCK = 256  # tokens whose probabilities are added up together


@dataclass(frozen=True)
class Wishes:
    """count: of texts. length: tokens of each. openings_each: as in `starts.starts`."""

    count: int
    length: int
    seed: int = 0
    openings_each: int = starts.OPENINGS_EACH


def windows(model: nn.Module, tokenizer: Any, wishes: Wishes, on_progress: OnProgress) -> np.ndarray:
    """Texts that the model wrote: (count, length), int32.

    model: unquantized or 8-bit, as `source_model.load` gives it. on_progress: (done, total, words). The same
    seed gives the same tokens on the same machine, whatever else drew from mx.random. Texts that repeat
    themselves are written anew from another start. Raises SpqtError for a length beyond the model's
    context, and for logits that are not finite.
    """
    count, length, seed = wishes.count, wishes.length, wishes.seed
    context.window(context.of(model), length, length)
    vocabulary, at_once = _vocabulary(model), _at_once(model, length, count)
    begun = starts.starts(tokenizer, vocabulary, (count + 1) * (TRIES + 1), seed, wishes.openings_each)
    found = np.zeros((count, length), np.int32)
    wanted, words = np.arange(count), "writing text"
    for attempt in range(TRIES + 1):
        for at in range(0, len(wanted), at_once):
            part = wanted[at : at + at_once]
            # count + 1: kinds come in turn, and after `count` starts they often begin anew
            first = [begun[attempt * (count + 1) + place][:length] for place in part]
            on_step = _steps(on_progress, at * length, len(part), len(wanted) * length, words)
            found[part] = _write(model, first, length, np.random.SeedSequence([seed, attempt, at]), on_step)
        wanted = np.array([place for place in wanted if repeats_itself(found[place])], int)
        words = f"writing {len(wanted)} repetitive texts anew"
    return found


def _steps(on_progress: OnProgress, done: int, texts: int, total: int, words: str) -> Callable[[int], None]:
    """Progress in tokens from steps of so many texts, after `done` tokens."""
    return lambda step: on_progress(done + step * texts, total, words)


def repeats_itself(tokens: np.ndarray) -> bool:
    """Whether a text, (length,), is mostly the same few tokens."""
    looked_at = tokens[:LOOKED_AT]
    return len(np.unique(looked_at)) < FEW_KINDS * len(looked_at)


def _vocabulary(model: nn.Module) -> int:
    """The number of tokens that a model gives logits for; nothing is computed."""
    return int(model(mx.zeros((1, 1), mx.int32), cache=_cache(model)).shape[-1])


def _cache(model: nn.Module) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def _at_once(model: nn.Module, length: int, count: int) -> int:
    """Texts to write together: AT_ONCE, or as many as their cache allows; groups are evenly large."""
    cache = _cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    held = sum(entry.nbytes for entry in cache) * -(-length // min(256, length))  # it grows in steps of 256
    room = CACHE_FRACTION * psutil.virtual_memory().total
    most = max(1, min(AT_ONCE, int(room / max(held, 1))))
    return -(-count // -(-count // most))


def _write(
    model: nn.Module,
    begun: list[list[int]],
    length: int,
    seed: np.random.SeedSequence,
    on_step: Callable[[int], None],
) -> np.ndarray:
    """Each start continued to `length` tokens: (texts, length), int32."""
    draw = _drawn_by_numpy(seed) if many_rows.on_cpu() else _drawn_by_mlx(seed)
    tokens = np.zeros((len(begun), length), np.int32)
    lengths = np.array([len(one) for one in begun])
    for row, one in zip(tokens, begun, strict=True):
        row[: len(one)] = one
    cache = _cache(model)
    with many_texts.many_texts(model):
        for place in range(1, length):
            logits = model(mx.array(tokens[:, place - 1 : place]), cache=cache)[:, -1]
            mx.eval([entry.state for entry in cache], logits)
            sampled = draw(logits)
            tokens[:, place] = np.where(lengths > place, tokens[:, place], sampled)
            on_step(place)
    return tokens


def _drawn_by_numpy(seed: np.random.SeedSequence) -> Callable[[mx.array], np.ndarray]:
    """Sampling by inverting the distribution, in two levels: one exp a logit, and no logarithm."""
    random = np.random.default_rng(seed)

    def draw(logits: mx.array) -> np.ndarray:
        p = np.array(logits.astype(mx.float32))  # (texts, vocabulary)
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        whole = p.shape[1] // _BLOCK * _BLOCK
        blocks = p[:, :whole].reshape(len(p), -1, _BLOCK).sum(axis=-1)
        if whole < p.shape[1]:
            blocks = np.append(blocks, p[:, whole:].sum(axis=-1, keepdims=True), axis=-1)
        ends = np.cumsum(blocks, axis=-1, dtype=np.float64)
        _check(bool(np.isfinite(ends[:, -1]).all()))
        return np.array([_inverse(*each) for each in zip(p, ends, random.random(len(p)), strict=True)])

    return draw


def _inverse(p: np.ndarray, ends: np.ndarray, uniform: float) -> int:
    """The token at `uniform` of a distribution p, (vocabulary,); ends: sums of p to each block's end."""
    at = uniform * ends[-1]
    block = min(int(np.searchsorted(ends, at, side="right")), len(ends) - 1)
    within = np.cumsum(p[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    at -= ends[block - 1] if block else 0.0
    place = int(np.searchsorted(within, at, side="right"))
    if place == len(within):  # by rounding: the last token that has a probability
        place = int(np.flatnonzero(within == within[-1])[0])
    return block * _BLOCK + place


def _drawn_by_mlx(seed: np.random.SeedSequence) -> Callable[[mx.array], np.ndarray]:
    key = mx.random.key(int(seed.generate_state(1, np.uint64)[0]))

    def draw(logits: mx.array) -> np.ndarray:
        nonlocal key
        logits = logits.astype(mx.float32)
        key, mine = mx.random.split(key)
        sampled = mx.random.categorical(logits, key=mine)
        finite = mx.isfinite(mx.logsumexp(logits, axis=-1)).all()
        mx.eval(sampled, finite, key)
        _check(bool(finite.item()))
        return np.array(sampled)

    return draw


def _check(finite: bool) -> None:
    if not finite:
        raise SpqtError(
            "the model's logits are not finite, so it can't write text",
            "its weights may be damaged; download it again, or give a text: --data FILE",
        )
