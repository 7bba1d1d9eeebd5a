"""Transformer blocks that follow one another, as one CPU operation in decoding.

Three operations a block and the Python around them cost a quarter of a small model's token. Which blocks
follow one another is seen from a step that ran block by block: one's result was the next one's input. The
first of a chain then computes all of it, and the others hand out what is theirs, if they are asked for just
that: with the result of the block before them, the cache that they had, and all else as it was. Otherwise
they run by themselves.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from spqt_cli.backends import cpu
from spqt_cli.decode import active_counts, phase

_HOLDERS, _KEYS, _KNOWN = (attrgetter(name) for name in ("holders", "keys", "known"))
MOST = 8  # blocks: an output of an operation holds all its inputs, so its cost grows with their square


class Steps(NamedTuple):
    """What a block's token takes, prepared: see `cpu.prepare_chain`. layers: q, k, v, o, gate, up, down.

    holders, keys, known: where what the steps were made of lies, and what lay there; see `cpu.same`.
    """

    front: Any
    attention: Any
    tail: Any
    layers: list[Any]
    skips: bool
    holders: list[Any]
    keys: list[str]
    known: list[Any]


class Member(Protocol):
    """A block that may be in a chain. chain: gives it while it is there; place: in it; alone: not in one."""

    chain: "Callable[[], Chain | None] | None"
    place: int
    alone: bool

    def steps(self) -> Steps | None:
        """What its token takes as it was prepared last; None for one that can't be part of a chain."""
        ...  # pragma: no cover


class _Pending(NamedTuple):
    """A step that the first block computed for all.

    before: each cache's keys and values, and with them its place, until it has the new ones. given: y as they
    were made, whatever is done to `y` in place. tally: of the step, when it is over.
    """

    mask: mx.array | None
    caches: list[Any]
    before: list[Any]
    places: list[int]
    y: list[mx.array]
    given: list[mx.array]
    keys: list[Any]
    values: list[Any]
    tally: active_counts.Tally | None
    counts: mx.array


class Chain:
    """Some blocks, the steps that they had when this was made, and the caches that they last met.

    The first block keeps it; it keeps no block, and no cache but while a step is under way.
    """

    def __init__(self, members: Sequence[Member], steps: list[Steps], run: Any) -> None:
        from mlx_lm.models.cache import BatchKVCache, KVCache

        self.members = [weakref.ref(member) for member in members]
        self.steps, self.caches = steps, list[weakref.ref[Any]]()
        self._run, self._kinds = run, (KVCache, BatchKVCache)
        self._groups = [active_counts.One([layer for one in steps for layer in one.layers])]
        self._skips = steps[0].skips
        parts = ([part for one in steps for part in each(one)] for each in (_HOLDERS, _KEYS, _KNOWN))
        self._sources = tuple(parts)
        self._pending: _Pending | None = None
        for place, member in enumerate(members):
            member.chain, member.place = (lambda: self) if place == 0 else weakref.ref(self), place

    def result(self, at: int, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
        """What the block at this place gives for x, a row of each sequence; keys and values join its cache.

        None: unknown, and nothing was done.
        """
        pending, self._pending = self._pending, None
        if at == 0:
            if pending is not None:  # what follows here did not follow there
                self._forget()
                return None
            pending = self._begun(x, mask, cache)
        elif pending is not None and not self._follows(pending, at, x, mask):
            self._forget(alone=True)  # something lies between them that the step before did not show
            return None
        if pending is None or not self._stands(pending, at, mask, cache):
            return None
        cache.keys, cache.values = pending.keys[at], pending.values[at]
        pending.keys[at] = pending.values[at] = pending.before[at] = None  # or the next step copies the cache
        joined(cache, pending.places[at], mask)
        if at < len(self.members) - 1:
            self._pending = pending
        elif pending.tally is not None:
            pending.tally.keep([pending.counts])
        return pending.y[at]

    def _begun(self, x: mx.array, mask: Any, cache: Any) -> _Pending | None:
        if self._skips and not phase.decodes():
            return None
        caches: list[Any] = [ref() for ref in self.caches]
        kind = type(cache)
        if caches[0] is not cache or any(type(one) is not kind or one.keys is None for one in caches):
            return None
        before = [(one.keys, one.values) for one in caches]
        keys, values = (list(arrays) for arrays in zip(*before, strict=True))
        one_text, batched = self._kinds
        if mask is None and kind is one_text:
            batch = None
        elif isinstance(mask, mx.array) and kind is batched:
            batch = [one.left_padding for one in caches], mask
        else:
            return None
        places = [_place(one, mask) for one in caches]
        if not cpu.same(*self._sources) or not self._run.takes(x, keys, values, places, batch):
            return None
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._groups, x.size // x.shape[-1])
        running = None if tally is None else tally.running[0]
        y, keys, values, counts = self._run(x, keys, values, places, running, batch)
        _here.links = []  # of steps before: what runs by itself from now on tells anew
        return _Pending(mask, caches, before, places, y, cpu.held(y), keys, values, tally, counts)

    def _follows(self, pending: _Pending, at: int, x: mx.array, mask: Any) -> bool:
        """Whether x is what the block before handed out, not changed in place since."""
        return (
            x is pending.y[at - 1]
            and cpu.identity(x) == cpu.identity(pending.given[at - 1])
            and mask is pending.mask
        )

    def _stands(self, pending: _Pending, at: int, mask: Any, cache: Any) -> bool:
        """Whether the block's cache, weights and thresholds are those of when the step began."""
        known = pending.before[at]
        return (
            known is not None
            and cache is pending.caches[at]
            and cache.keys is known[0]
            and cache.values is known[1]
            and _place(cache, mask) == pending.places[at]
            and (not self._skips or phase.decodes())
            and cpu.same(*self.steps[at][-3:])
        )

    def _forget(self, alone: bool = False) -> None:
        for ref in self.members:
            if (member := ref()) is not None:
                member.chain, member.alone = None, member.alone or alone


def joined(cache: Any, place: int, mask: Any) -> None:
    """Note in a cache that a token lies at its next place. mask: None for a cache of one sequence."""
    if mask is None:
        cache.offset = place + 1
    else:
        cache._idx = place + 1
        cache.offset = cache._idx - cache.left_padding  # as offset + 1, but of no step before


def _place(cache: Any, mask: Any) -> int:
    place: int = cache.offset if mask is None else cache._idx
    return place


class _Here(threading.local):
    """A thread's last blocks that ran by themselves, each with its cache; one's y was the next one's x."""

    def __init__(self) -> None:
        self.links: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
        self.last: tuple[weakref.ref[mx.array], int] | None = None


_here = _Here()


def ran(member: Member, x: mx.array, y: mx.array, cache: Any) -> None:
    """Note that a block computed y from x, a row of each sequence of its cache, by itself."""
    last, links = _here.last, _here.links
    follows = links and last is not None and x is last[0]() and cpu.identity(x) == last[1]
    if not follows or links[0][0]() is member:
        _here.links = []
        _join(links)
    _here.links.append((weakref.ref(member), weakref.ref(cache)))
    _here.last = weakref.ref(y), cpu.identity(y)


def _join(links: list[tuple[weakref.ref[Any], weakref.ref[Any]]]) -> None:
    """Let these blocks run together from their next step on, those that skip and those that do not apart."""
    members: list[Any] = [member() for member, _ in links]
    steps: list[Any] = [None if member is None or member.alone else member.steps() for member in members]
    kinds = [None if one is None else one.skips for one in steps]
    borders = [0, *(i for i in range(1, len(links)) if kinds[i] is not kinds[i - 1]), len(links)]
    for first, end in pairwise(borders):
        if end - first < 2 or kinds[first] is None:
            continue
        number = -(-(end - first) // MOST)
        for part in range(number):
            some = slice(first + (end - first) * part // number, first + (end - first) * (part + 1) // number)
            caches = [cache for _, cache in links[some]]
            if len({id(member) for member in members[some]}) == len({ref() for ref in caches}) == len(caches):
                _chain(members[some], steps[some], caches)


def _chain(members: list[Any], steps: list[Steps], caches: list[weakref.ref[Any]]) -> None:
    chain: Chain | None = members[0].chain and members[0].chain()
    if chain is None or [ref() for ref in chain.members] != members or not _same(chain.steps, steps):
        run = cpu.prepare_chain([(one.front, one.attention, one.tail) for one in steps])
        if run is None:
            return
        chain = Chain(members, steps, run)
    chain.caches = caches


def _same(some: list[Steps], others: list[Steps]) -> bool:
    return all(a.front is b.front and a.tail is b.tail for a, b in zip(some, others, strict=True))
