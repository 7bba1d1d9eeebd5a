"""Steps of one token for many texts at once on the CPU: what sampling a batch is made of.

MLX's own CPU build takes many times as long: its products run at a few GFLOP/s, its exp at a fourth of
numpy's speed, and its attention at an eighth. So attention and activations are our extension's, or go through
numpy where it does not run, and products go through the extension with weights in 8 bits, the rows of all
texts as those of one prompt: that takes the time of numpy's BLAS, whose threads are slow on a busy machine,
and two thirds of that of rows computed each as alone. On a GPU everything here steps aside. Nothing here can
be differentiated. It knows no sampling.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.backends import cpu, cpu_settings, select
from spqt_cli.decode import foreign, hooks_cpu
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.measure import many_rows
from spqt_cli.measure.many_rows import host, unpacked

BITS, GROUP_SIZE = 8, 64
LEAST_INPUTS = 32  # of a layer that is worth it; gemma3n looks into the weights of a smaller one
SMALL_PRODUCT = 1 << 16  # multiplications: of more than 80,000 OpenBLAS takes five times as long for each


@contextmanager
def many_texts(model: nn.Module) -> Iterator[None]:
    """In this block `model`, given (texts, 1) tokens, computes as the module's text says, if on the CPU.

    Where our extension runs, plain linear layers, and embeddings that are heads, are held in 8 bits as well,
    in the Zigzag layout, and these compute.
    """
    if not many_rows.on_cpu():
        yield
        return
    extension, _ = cpu.status()
    threads = cpu.threads() if extension else cpu_settings.default_threads()
    with (
        ThreadPoolExecutor(threads) as pool,
        _eight_bits(model if extension else None),
        foreign.replaced([*_layers(extension), *_functions(pool, threads, extension)]),
        many_rows.holding(0 if extension else many_rows.spare_bytes()),
        many_rows.uncompiled(),
        hooks_cpu.also_with(many_rows.sigmoid),
    ):
        yield


class _Together(nn.Module):
    """A plain layer in 8 bits: the rows of all texts are multiplied as those of one prompt."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.packed = ZigzagLinear.from_linear(plain, GROUP_SIZE, BITS)
        self.weight = plain.weight  # for a model that asks for its kind
        mx.eval(self.packed.parameters())

    def __call__(self, x: mx.array) -> mx.array:
        return _in_one(x, lambda rows: select.matmul(rows, self.packed))


def _in_one(x: mx.array, product: Callable[[mx.array], mx.array]) -> mx.array:
    """product of the rows of x (..., inputs) as those of one text."""
    y = product(x.reshape(1, -1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@contextmanager
def _eight_bits(model: nn.Module | None) -> Iterator[None]:
    """Put 8-bit twins in the place of a model's plain linear layers here."""
    if model is None:
        yield
        return
    linear = [(path, one) for path, one in model.named_modules() if type(one) is nn.Linear]
    plain = [(path, one) for path, one in linear if one.weight.shape[-1] >= LEAST_INPUTS]
    model.update_modules(tree_unflatten([(path, _Together(one)) for path, one in plain]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(plain))


def _layers(extension: bool) -> list[tuple[Any, str, Any]]:
    """What computes a product of many rows."""
    if not extension:
        return [
            (nn.QuantizedLinear, "__call__", lambda self, x: _product(x, unpacked(self), self.get("bias"))),
            (nn.QuantizedEmbedding, "as_linear", lambda self, x: _product(x, unpacked(self), None)),
            (nn.Linear, "__call__", lambda self, x: _product(x, host(self.weight), self.get("bias"))),
            (nn.Embedding, "as_linear", lambda self, x: _product(x, host(self.weight), None)),
        ]
    heads: dict[int, _Together] = {}

    def plain_head(self: nn.Embedding, x: mx.array) -> mx.array:
        if id(self) not in heads:
            heads[id(self)] = _Together(self)
        return cast(mx.array, heads[id(self)](x))

    return [
        (
            nn.QuantizedLinear,
            "__call__",
            lambda self, x: _in_one(x, lambda rows: hooks_cpu.quantized_linear(self, rows)),
        ),
        (
            nn.QuantizedEmbedding,
            "as_linear",
            lambda self, x: _in_one(x, lambda rows: hooks_cpu.as_linear(self, rows)),
        ),
        (nn.Embedding, "as_linear", plain_head),
    ]


def _functions(pool: ThreadPoolExecutor, threads: int, extension: bool) -> list[tuple[Any, str, Any]]:
    """What computes attention and activations."""

    def attend(q: mx.array, k: mx.array, v: mx.array, **form: Any) -> mx.array:
        if extension and form.get("mask") is None and hooks_cpu.attends(q, k, v, **form):
            return hooks_cpu.attention(q, k, v, **form)
        if q.shape[2] != 1 or form.get("mask") is not None or form.get("sinks") is not None:
            return many_rows.attention(q, k, v, **form)
        return _attention(pool, threads, q, k, v, form["scale"])

    return [
        (mx.fast, "scaled_dot_product_attention", attend),
        (mx, "sigmoid", many_rows.sigmoid),
        (mx, "tanh", many_rows.tanh),
    ]


def _same_kind(y: np.ndarray, like: mx.array) -> mx.array:
    return mx.array(y).astype(like.dtype)


def _product(x: mx.array, w: np.ndarray, bias: mx.array | None) -> mx.array:
    """x @ w.T + bias, w (outputs, inputs): w as the left factor is a fourth faster at 64 rows."""
    rows = host(x).reshape(-1, x.shape[-1])
    y = _same_kind((w @ rows.T).T, x).reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


def _attention(
    pool: ThreadPoolExecutor, threads: int, q: mx.array, k: mx.array, v: mx.array, scale: float
) -> mx.array:
    """softmax(q @ k.T * scale) @ v: q (B, heads, 1, D); k, v (B, key heads, length, D); texts shared out."""
    mx.eval(q, k, v)
    texts, heads, _, width = q.shape
    grouped = (host(q) * np.float32(scale)).reshape(texts, k.shape[1], -1, width)
    keys, values = host(k), host(v)
    y = np.empty((*grouped.shape[:3], values.shape[-1]), np.float32)
    length = keys.shape[2]
    block = max(16, SMALL_PRODUCT // (grouped.shape[2] * width))

    def run(part: slice) -> None:
        p = np.empty((*grouped[part].shape[:3], length), np.float32)
        for at in range(0, length, block):
            some = keys[part, :, at : at + block].swapaxes(-1, -2)
            np.matmul(grouped[part], some, out=p[..., at : at + block])
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        np.matmul(p, values[part], out=y[part])

    size = -(-texts // threads)
    list(pool.map(run, [slice(at, at + size) for at in range(0, texts, size)]))
    return _same_kind(y.reshape(texts, heads, 1, -1), q)
