"""Transformer blocks that follow one another, as one CPU operation in decoding.

Three operations a block and the Python around them cost a quarter of a small model's token. Which blocks
follow one another is seen from a token that ran block by block: one's result was the next one's input. The
first of a chain then computes all of it, and the others hand out what is theirs, if they are asked for just
that: with the result of the block before them and the cache that they had. Otherwise they run by themselves.
"""

import threading
import weakref
from collections.abc import Sequence
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
    """A block that may be part of a chain. place: in it. alone: never in one again."""

    chain: "Chain | None"
    place: int
    alone: bool

    def steps(self) -> Steps | None:
        """What its token takes as it was prepared last; None for one that can't be part of a chain."""
        ...  # pragma: no cover


class _Pending(NamedTuple):
    """A step that the first block computed for all. keys, values: None once the cache has them."""

    mask: mx.array | None
    places: list[int]
    y: list[mx.array]
    keys: list[mx.array | None]
    values: list[mx.array | None]
    caches: list[Any]


class Chain:
    """Some blocks, the steps that they had when this was made, and the caches that they last met."""

    def __init__(self, members: Sequence[Member], steps: list[Steps]) -> None:
        from mlx_lm.models.cache import BatchKVCache, KVCache

        self.members, self.steps, self._kinds = list(members), steps, (KVCache, BatchKVCache)
        self.caches: list[weakref.ref[Any]] = []
        self._run = cpu.prepare_chain([(one.front, one.attention, one.tail) for one in steps])
        self._groups = [active_counts.One([layer for one in steps for layer in one.layers])]
        self._skips = any(one.skips for one in steps)
        parts = ([part for one in steps for part in each(one)] for each in (_HOLDERS, _KEYS, _KNOWN))
        self._sources = tuple(parts)
        self._pending: _Pending | None = None
        for place, member in enumerate(members):
            member.chain, member.place = self, place

    def result(self, at: int, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
        """What the block at this place gives for x, a row of each sequence; keys and values join its cache.

        None: unknown, and nothing was done.
        """
        if at == 0:
            self._pending = self._begun(x, mask, cache)
        pending = self._pending
        if pending is None:
            return None
        if at and not (x is pending.y[at - 1] and cache is pending.caches[at] and mask is pending.mask):
            self._pending = None
            for member in self.members:  # something lies between them that the step before did not show
                member.chain, member.alone = None, True
            return None
        cache.keys, cache.values = pending.keys[at], pending.values[at]
        pending.keys[at] = pending.values[at] = None  # or the next step would copy the cache
        joined(cache, pending.places[at], mask)
        if at == len(self.members) - 1:
            self._pending = None
        return pending.y[at]

    def _begun(self, x: mx.array, mask: Any, cache: Any) -> _Pending | None:
        if self._skips and not phase.decodes():
            return None
        caches: list[Any] = [ref() for ref in self.caches]
        if caches[0] is not cache or any(one is None or one.keys is None for one in caches):
            return None
        keys, values = [one.keys for one in caches], [one.values for one in caches]
        one_text, batched = self._kinds
        if mask is None and type(cache) is one_text:
            places, batch = [one.offset for one in caches], None
        elif isinstance(mask, mx.array) and type(cache) is batched:
            places, batch = [one._idx for one in caches], (cache.left_padding, mask)
        else:
            return None
        if not cpu.same(*self._sources) or not self._run.takes(x, keys, values, places, batch):
            return None
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._groups, x.size // x.shape[-1])
        running = None if tally is None else tally.running[0]
        y, keys, values, counts = self._run(x, keys, values, places, running, batch)
        if tally is not None:
            tally.keep([counts])
        return _Pending(mask, places, y, keys, values, caches)


def joined(cache: Any, place: int, mask: Any) -> None:
    """Note in a cache that a token lies at its next place. mask: None for a cache of one sequence."""
    if mask is None:
        cache.offset = place + 1
    else:
        cache._idx = place + 1
        cache.offset = cache._idx - cache.left_padding  # as offset + 1, but of no step before


class _Here(threading.local):
    """A thread's last blocks that ran by themselves, each with its cache; one's y was the next one's x."""

    def __init__(self) -> None:
        self.links: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
        self.last: weakref.ref[mx.array] | None = None


_here = _Here()


def ran(member: Member, x: mx.array, y: mx.array, cache: Any) -> None:
    """Note that a block computed y from x, a row of each sequence of its cache, by itself."""
    if _here.last is None or x is not _here.last():
        _join(_here.links)
        _here.links = []
    _here.links.append((weakref.ref(member), weakref.ref(cache)))
    _here.last = weakref.ref(y)


def _join(links: list[tuple[weakref.ref[Any], weakref.ref[Any]]]) -> None:
    """Let these blocks run together from their next token on."""
    number = -(-len(links) // MOST)
    for part in range(number):
        some = links[len(links) * part // number : len(links) * (part + 1) // number]
        members: list[Any] = [member() for member, _ in some]
        steps: list[Any] = [None if member is None else member.steps() for member in members]
        if len(some) < 2 or None in steps or any(member.alone for member in members):
            continue
        chain: Chain | None = members[0].chain
        if chain is None or chain.members != members or not _same(chain.steps, steps):
            chain = Chain(members, steps)
        chain.caches = [cache for _, cache in some]


def _same(some: list[Steps], others: list[Steps]) -> bool:
    return all(a.front is b.front and a.tail is b.tail for a, b in zip(some, others, strict=True))
