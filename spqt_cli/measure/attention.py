"""Attention of many rows on the CPU with its gradients: our extension's where it runs, else numpy's.

In numpy a block of queries at a time meets the keys that it may see, for one text and one head of keys: the
scores stay small, and of causal attention half is never computed. Alone on a core both are as fast; where
other work runs, the threads of numpy's BLAS wait for one another in products as small as these.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from spqt_cli.backends import cpu

ROWS = 128  # queries of a block, for each head
CAUSAL = "causal"


def host(a: mx.array) -> np.ndarray:
    """a as float32 numpy, without a copy where it is float32 already."""
    return np.array(a.astype(mx.float32), copy=False)


def from_host(a: np.ndarray) -> mx.array:
    """a as an array of MLX. Products go through here: a signal that came meanwhile is heard as this begins,
    and what its handler raises is lost within mx.array (findings/mlx-array-loses-a-signal.sh).
    """
    return mx.array(a)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None) -> mx.array:
    """softmax(q @ k.T * scale + mask) @ v: q (B, heads, rows, D); k, v (B, key heads, length, D).

    mask: as in `mx.fast.scaled_dot_product_attention`: None, "causal", booleans or what is added.
    """
    added = mask if mask is None or isinstance(mask, str) else _added(mask, (*q.shape[:3], k.shape[2]))
    return _attend(added, q * scale, k, v).astype(q.dtype)


def _added(mask: mx.array, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as what is added to scores of that shape."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -math.inf)
    return np.broadcast_to(host(mask), shape)


def _attend(mask: Any, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if _extension_takes(mask, q, k, v):
            return cpu.attention(q, k, v, scale=1.0, causal=mask is not None)
        queries, keys, values = host(q), host(k), host(v)
        y = np.empty((*queries.shape[:3], values.shape[-1]), np.float32)
        for block in _blocks(queries, keys, mask):
            p = block.softmax()
            block.rows(y)[...] = (p @ values[block.seen]).reshape(block.rows(y).shape)
        return from_host(y)

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        q, k, v, dy = (host(a) for a in (*primals, cotangent))
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        for block in _blocks(q, k, mask):
            p = block.softmax()  # anew: keeping every layer's would not fit memory
            slope = block.rows(dy).reshape(-1, dy.shape[-1])
            dv[block.seen] += p.T @ slope
            ds = slope @ v[block.seen].T
            ds -= np.einsum("ij,ij->i", ds, p)[:, None]
            ds *= p
            block.rows(dq)[...] = (ds @ k[block.seen]).reshape(block.rows(dq).shape)
            dk[block.seen] += ds.T @ block.rows(q).reshape(-1, q.shape[-1])
        return from_host(dq), from_host(dk), from_host(dv)

    return cast(mx.array, forward(q, k, v))


def _extension_takes(mask: Any, q: mx.array, k: mx.array, v: mx.array) -> bool:
    plain = (mask is None or isinstance(mask, str)) and q.dtype == k.dtype == v.dtype == mx.float32
    return plain and q.size > 0 and cpu.status()[0] and cpu.attends(q, k, v)


class _Block:
    """Queries of one text that share a head of keys. seen: index of the keys and values that they see."""

    def __init__(self, place: tuple[int, int, slice], end: int, scores: tuple[Any, Any, Any]) -> None:
        text, self._head, self._rows = place
        self._text = text
        self.seen = (text, self._head, slice(0, end))
        self._q, self._k, self._mask = scores
        self._repeats = self._q.shape[1] // self._k.shape[1]

    def rows(self, a: np.ndarray) -> np.ndarray:
        """The block's part of an array (B, heads, rows, D): (repeats, rows of the block, D), a view."""
        first = self._head * self._repeats
        return a[self._text, first : first + self._repeats, self._rows]

    def softmax(self) -> np.ndarray:
        """The probabilities: (repeats * rows of the block, keys seen)."""
        rows = self.rows(self._q)
        scores = rows.reshape(-1, rows.shape[-1]) @ self._k[self.seen].T
        if isinstance(self._mask, str):
            size = rows.shape[1]
            scores.reshape(self._repeats, size, -1)[:, :, -size:] += _later(size)
        elif self._mask is not None:
            scores += self.rows(self._mask)[..., self.seen[2]].reshape(scores.shape)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores


@cache
def _later(size: int) -> np.ndarray:
    """What forbids each of so many queries the keys after it: (size, size)."""
    return np.triu(np.full((size, size), -math.inf, np.float32), 1)


def _blocks(q: np.ndarray, k: np.ndarray, mask: Any) -> Iterator[_Block]:
    texts, _, count, _ = q.shape
    heads, length = k.shape[1:3]
    for text in range(texts):
        for head in range(heads):
            for start in range(0, count, ROWS):
                stop = min(start + ROWS, count)
                end = length - count + stop if isinstance(mask, str) else length
                yield _Block((text, head, slice(start, stop)), end, (q, k, mask))
