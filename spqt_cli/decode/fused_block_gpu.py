"""A block's decode step on a GPU as two traced calls with no more than the attention product between them.

Heads, rotary positions and whatever else the attention module computes around the product are traced from
its own code (attention_traced.py), or done by the reduction of q/k/v where the module is plain
(positions.py).
"""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, positions
from spqt_cli.decode.attention_traced import Halves
from spqt_cli.decode.layers import ZigzagLinear

Counts = Sequence[interface.Count]
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
CLOSE = 0.05  # of an array's norm: a few roundings to bfloat16, grown by softmax; an error gives about 1


def traceable(attention: nn.Module) -> bool:
    """Whether all parts of an attention module are MLX's, mlx-lm's or Zigzag layers.

    A trace asks a part once and never again, so one that watches or counts its calls must stay untraced.
    """
    parts = (value for value in attention.values() if isinstance(value, nn.Module))
    return all(
        type(part) is ZigzagLinear or type(part).__module__.partition(".")[0] in ("mlx", "mlx_lm")
        for part in parts
    )


class Own(NamedTuple):
    """A block's own parts: its attention module, the norm before, and that module's call.

    attended: normed x, its products, mask and cache -> what the module gives to `o_proj`.
    """

    attention: nn.Module
    norm: interface.Norm
    attended: Callable[[mx.array, list[mx.array], Any, Any], mx.array]


class Around:
    """One block's step; it is taken once it has given what the block's own code gives."""

    def __init__(self, x: mx.array, own: Own, head: interface.HeadStep, tail: interface.TailStep) -> None:
        self._own, self._head = own, head
        self._halves = halves = Halves(own.attention)
        self._proven: bool | None = None
        self._place: Callable[[int], mx.array] = _position

        @mx.compile
        def before(
            x: mx.array, offset: mx.array, count: interface.Count
        ) -> tuple[list[mx.array], interface.Count]:
            normed, products, count = head(x, count)
            return halves.before(normed, products, offset), count

        @mx.compile
        def after(attended: mx.array, x: mx.array, counted: Counts) -> tuple[mx.array, Counts]:
            return tail(halves.after(attended), x, counted)

        self._before: interface.RotaryStep = before
        self._after = after
        shared = own.attention["q_proj"]._siblings.layers
        together = [id(own.attention.get(name)) for name in PROJECTIONS] == list(map(id, shared))
        if together and (turning := positions.form_of(own.attention)):
            kind, turns = turning
            if step := select.prepare_rotary(x, own.norm, shared, kind):
                self._before, self._place = step, turns.at
                halves.settings = {"scale": own.attention.scale}

    def step(self, x: mx.array, mask: None, cache: Any, counted: Counts) -> tuple[mx.array, Counts]:
        """y for x, one row, and the counts after `counted`: of q/k/v; o; gate and up; down."""
        (queries, keys, values), count = self._before(x, self._place(cache.offset), counted[0])
        attended = self._halves.product(queries, keys, values, cache)
        y, counts = self._after(attended, x, counted[1:])
        return y, [count, *counts]

    def takes(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether a step with these can run so."""
        if mask is not None or type(getattr(cache, "offset", None)) is not int:
            return False
        if self._proven is None:
            try:
                mx.eval(x)
            except ValueError:  # within mx.compile or mx.grad
                return False
            with active_counts.counting():  # a trial is no step
                self._proven = self._prove(x, cache)
        return self._proven

    def _prove(self, x: mx.array, cache: Any) -> bool:
        """Whether q, k, v and what goes to `o_proj` are the own code's; both work on copies of the cache."""
        try:
            normed, products, _ = self._head(x, None)
            expected = self._halves.traced(normed, products, mx.array(cache.offset))[0]
            found, _ = self._before(x, self._place(cache.offset), None)
            if not all(_close(a, b) for a, b in zip(found, expected, strict=True)):
                return False
            queries, keys, values = found
            attended = self._halves.product(queries, keys, values, copy.deepcopy(cache))
            own = self._own.attended(normed, products, None, copy.deepcopy(cache))
            return _close(self._halves.after(attended), own)
        except Exception:  # code of others, which may have any other form
            return False


def _close(found: mx.array, expected: mx.array) -> bool:
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    return a.shape == b.shape and bool((mx.linalg.norm(a - b) <= CLOSE * mx.linalg.norm(b)).item())


@lru_cache(maxsize=1)
def _position(offset: int) -> mx.array:
    """A position as an array, (), int32: one for all blocks of a step."""
    return mx.array(offset)
