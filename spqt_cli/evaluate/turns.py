"""Speeds of several ways to run a model, by turns: each decodes the same number of tokens in every round.

It knows models and clocks; what the ways are and what their speeds mean, it does not.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from spqt_cli.decode import context
from spqt_cli.decode.only_mlx import check_unpatched, only_mlx

TIMED_TOKENS = 32  # of each turn
KEPT_PROMPT = 512  # tokens: the cache of a prompt that is no longer is kept for the rounds to come
WARM_TOKENS = 4  # decoded before the clock starts, in every turn: kernels are built, caches are warm


@dataclass(frozen=True)
class Way:
    """One way to run. ready: the model as it should run, made so at the begin of each turn.

    stock: the model is mlx-lm's alone, and MLX's own functions run it.
    """

    name: str
    ready: Callable[[], Any]
    stock: bool = False


@dataclass(frozen=True)
class Speeds:
    """Tokens/s of each round. ratios: to another way's in the same round, or empty."""

    rounds: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        """Tokens per second."""
        return statistics.median(self.rounds)

    @property
    def ratio(self) -> float:
        """How many times as fast as the other way, the median of the rounds; 1 for that way itself."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Clock:
    """What each turn runs. prompt: token ids, fed first. tokens: decoded then, whatever they say.

    An end of the answer does not end a turn. rounds: that count, after one that warms up.
    """

    prompt: Sequence[int]
    tokens: int
    rounds: int


def take(
    ways: Sequence[Way], base: str, clock: Clock, on_progress: Callable[[float, float, str], None]
) -> dict[str, Speeds]:
    """The speeds of `ways` by name. base: what ratios are to. on_progress: called before each round."""
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    kept: dict[str, list[Any]] = {}
    for number in range(clock.rounds + 1):
        on_progress(
            number, clock.rounds + 1, f"timing {clock.tokens} tokens each" if number else "warming up"
        )
        for way in ways:
            speed = _turn(way, clock, kept)
            if number:
                found[way.name].append(speed)
    return {
        name: Speeds(own, [one / other for one, other in zip(own, found[base], strict=True)])
        for name, own in found.items()
    }


def room(config: dict[str, Any], prompt: int, wished: int) -> int:
    """The tokens that a turn can time: what is wished, at most TIMED_TOKENS and what the context leaves."""
    limit = context.tokens(config)
    left = TIMED_TOKENS if limit is None else context.room(limit, prompt) - WARM_TOKENS
    return max(1, min(wished if wished > 0 else TIMED_TOKENS, TIMED_TOKENS, left))


def _turn(way: Way, clock: Clock, kept: dict[str, list[Any]]) -> float:
    """Tokens per second of one turn. kept: by way, the cache of the prompt but for its last token."""
    import mlx.core as mx
    from mlx_lm.models import cache as caches

    model = way.ready()
    with only_mlx() if way.stock else nullcontext():
        if way.stock:
            check_unpatched(model)
        loop = importlib.import_module("mlx_lm.generate").generate_step
        fed = list(clock.prompt[-1:] if way.name in kept else clock.prompt)
        cache = kept.pop(way.name, None) or caches.make_prompt_cache(model)
        steps = loop(mx.array(fed), model, max_tokens=WARM_TOKENS + clock.tokens, prompt_cache=cache)
        for _ in range(WARM_TOKENS):
            next(steps)
        start = time.perf_counter()
        for _ in range(clock.tokens):
            next(steps)
        seconds = time.perf_counter() - start
        steps.close()
    held = getattr(cache[0], "offset", None)
    if isinstance(held, int) and len(clock.prompt) <= KEPT_PROMPT and caches.can_trim_prompt_cache(cache):
        more = held - len(clock.prompt) + 1
        if caches.trim_prompt_cache(cache, more) == more:
            kept[way.name] = cache
    return clock.tokens / seconds
