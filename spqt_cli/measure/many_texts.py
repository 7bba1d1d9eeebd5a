"""Steps of one token for many texts at once on the CPU, by numpy: what sampling a batch is made of.

In MLX's own CPU build such a step takes many times as long: its products run at a few GFLOP/s, its exp at a
fourth of numpy's speed, and its attention at an eighth, as that of our extension, which is made for one text.
On a GPU everything here steps aside. Nothing here can be differentiated. It knows no sampling.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.decode import foreign
from spqt_cli.measure import many_rows
from spqt_cli.measure.many_rows import host, unpacked


@contextmanager
def many_texts() -> Iterator[None]:
    """In this block a model that is given (texts, 1) tokens runs through numpy, if the device is the CPU."""
    if not many_rows.on_cpu():
        yield
        return
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:

        def attend(q: mx.array, k: mx.array, v: mx.array, **form: Any) -> mx.array:
            if q.shape[2] != 1 or form.get("mask") is not None or form.get("sinks") is not None:
                return many_rows.attention(q, k, v, **form)
            return _attention(pool, threads, q, k, v, form["scale"])

        replaced: list[tuple[Any, str, Any]] = [
            (mx.fast, "scaled_dot_product_attention", attend),
            (nn.Linear, "__call__", lambda self, x: _product(x, host(self.weight), self.get("bias"))),
            (nn.QuantizedLinear, "__call__", lambda self, x: _product(x, unpacked(self), self.get("bias"))),
            (nn.Embedding, "as_linear", lambda self, x: _product(x, host(self.weight), None)),
            (nn.QuantizedEmbedding, "as_linear", lambda self, x: _product(x, unpacked(self), None)),
            (mx, "sigmoid", _sigmoid),
            (mx, "tanh", lambda a: _same_kind(np.tanh(host(a)), a)),
        ]  # fmt: skip
        mx.disable_compile()  # compiled activations would not ask for ours
        try:
            with foreign.replaced(replaced), many_rows.holding(many_rows.spare_bytes()):
                yield
        finally:
            mx.enable_compile()


def _same_kind(y: np.ndarray, like: mx.array) -> mx.array:
    return mx.array(y).astype(like.dtype)


def _product(x: mx.array, w: np.ndarray, bias: mx.array | None) -> mx.array:
    """x @ w.T + bias, w (outputs, inputs): w as the left factor is a fourth faster at 64 rows."""
    rows = host(x).reshape(-1, x.shape[-1])
    y = _same_kind((w @ rows.T).T, x).reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


def _sigmoid(a: mx.array) -> mx.array:
    y = np.negative(host(a))
    with np.errstate(over="ignore"):  # exp(-x) becomes inf, and the sigmoid 0
        np.exp(y, out=y)
    y += 1
    return _same_kind(np.reciprocal(y, out=y), a)


def _attention(
    pool: ThreadPoolExecutor, threads: int, q: mx.array, k: mx.array, v: mx.array, scale: float
) -> mx.array:
    """softmax(q @ k.T * scale) @ v: q (B, heads, 1, D); k, v (B, key heads, length, D); texts shared out."""
    mx.eval(q, k, v)
    texts, heads, _, width = q.shape
    grouped = (host(q) * np.float32(scale)).reshape(texts, k.shape[1], -1, width)
    keys, values = host(k), host(v)
    y = np.empty((*grouped.shape[:3], values.shape[-1]), np.float32)

    def run(part: slice) -> None:
        p = np.matmul(grouped[part], keys[part].swapaxes(-1, -2))
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        np.matmul(p, values[part], out=y[part])

    size = -(-texts // threads)
    list(pool.map(run, [slice(at, at + size) for at in range(0, texts, size)]))
    return _same_kind(y.reshape(texts, heads, 1, -1), q)
