"""Many-row products on the CPU by numpy's BLAS, for calibration and evaluation.

MLX's own CPU build multiplies at a few GFLOP/s on one thread; numpy's bundled BLAS is tens of times
faster on the same machine. Results are computed when called, not lazily, and can be differentiated.
On a GPU everything here steps aside and MLX's own operations run. It knows nothing of calibration.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np
import psutil
from mlx import nn

from spqt_cli.decode import foreign, hooks_cpu
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.format import layout

HELD_FRACTION = 0.3  # of the available memory, for weights held unpacked

_attention = hooks_cpu.STOCK["scaled_dot_product_attention"]


def on_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def host(a: mx.array) -> np.ndarray:
    """a as float32 numpy, without a copy where it is float32 already."""
    return np.array(a.astype(mx.float32), copy=False)


def linear(x: mx.array, layer: ZigzagLinear) -> mx.array:
    """x @ W.T + bias of a Zigzag layer, no channel skipped: x (..., inputs) -> (..., outputs).

    Can be differentiated with respect to x on every backend.
    """
    if not on_cpu():
        packed = (layer["weight"], layer["scales"], layer["biases"])
        y = layout.matmul(x, *packed, outputs=layer.outputs, bits=layer.bits, group_size=layer.group_size)
    else:
        y = _banded(x.reshape(-1, x.shape[-1]), layer).reshape(*x.shape[:-1], layer.outputs).astype(x.dtype)
    bias = layer.get("bias")
    return y if bias is None else y + bias


def _banded(rows: mx.array, layer: ZigzagLinear) -> mx.array:
    # The weights, (bands, inputs, band), are unpacked anew in the backward pass: holding all layers' would
    # not fit memory.
    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        y = np.matmul(host(x), unpacked(layer))  # (bands, rows, band)
        return mx.array(y.swapaxes(0, 1).reshape(x.shape[0], -1)[:, : layer.outputs])

    @forward.vjp
    def backward(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        w = unpacked(layer)
        bands, _, band = w.shape
        dy = np.zeros((cotangent.shape[0], bands * band), np.float32)
        dy[:, : layer.outputs] = host(cotangent)
        dx = sum(dy[:, b * band : (b + 1) * band] @ w[b].T for b in range(bands))
        return mx.array(dx)

    return cast(mx.array, forward(rows))


def _plain(x: mx.array, w: np.ndarray, bias: mx.array | None) -> mx.array:
    """x @ w.T + bias, w (outputs, inputs): what a stock layer computes; differentiable in x alone."""

    @mx.custom_function
    def forward(rows: mx.array) -> mx.array:
        return mx.array(host(rows) @ w.T)

    @forward.vjp
    def backward(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return mx.array(host(cotangent) @ w)

    product = cast(mx.array, forward(x.reshape(-1, x.shape[-1])))
    y = product.reshape(*x.shape[:-1], w.shape[0]).astype(x.dtype)
    return y if bias is None else y + bias


def unpacked(layer: Any) -> np.ndarray:
    """The weights of a quantized layer: float32, groups along the last axis; those of `holding`, if any."""
    held = _held.weights.get(id(layer))
    if held is not None:
        return held[1]
    w = _unpack(layer)
    if w.nbytes <= _held.left:
        _held.left -= w.nbytes
        _held.weights[id(layer)] = (layer, w)  # with the layer, whose id must not be given to another
    return w


def _unpack(layer: Any) -> np.ndarray:
    """3, 5 and 6 bits by numpy: MLX's CPU build takes twice as long for codes that straddle bytes."""
    if layer.mode not in ("affine", "zigzag"):
        scales = (layer.scales, layer.get("biases"))
        return host(mx.dequantize(layer.weight, *scales, layer.group_size, layer.bits, mode=layer.mode))
    scales, biases = (layer[name].astype(mx.float32) for name in ("scales", "biases"))
    if layer.bits not in (3, 5, 6):
        return host(mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits))
    w = codes(np.array(layer.weight, copy=False), layer.bits).astype(np.float32)
    groups = w.reshape(*scales.shape, layer.group_size)
    groups *= host(scales)[..., None]
    groups += host(biases)[..., None]
    return w


def codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Integers from a little-endian stream of bits: packed (..., words) uint32 -> (..., count) uint8.

    Eight codes fill `bits` bytes; each run of eight is read as one 64-bit word.
    """
    stream = np.append(packed.reshape(-1).view(np.uint8), np.zeros(8, np.uint8))
    runs = np.ndarray((packed.nbytes // bits,), "<u8", stream, strides=(bits,)).copy()
    found = np.empty((len(runs), 8), np.uint8)
    for place in range(8):
        found[:, place] = (runs >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return found.reshape(*packed.shape[:-1], -1)


def _softmax(q: np.ndarray, k: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """softmax(q @ k.T + mask) in numpy, whose exp is many times faster than that of MLX's CPU build."""
    scores = np.matmul(q, k.swapaxes(-1, -2))
    if mask is not None:
        scores += mask
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _attend(mask: np.ndarray | None, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q @ k.T + mask) @ v, all (B, heads, rows, D)."""

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.array(np.matmul(_softmax(host(q), host(k), mask), host(v)))

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        q, k, v, dy = (host(a) for a in (*primals, cotangent))
        p = _softmax(q, k, mask)  # anew: keeping every layer's would not fit memory
        ds = np.matmul(dy, v.swapaxes(-1, -2))
        ds -= (ds * p).sum(axis=-1, keepdims=True)
        ds *= p
        dv = np.matmul(p.swapaxes(-1, -2), dy)
        return mx.array(np.matmul(ds, k)), mx.array(np.matmul(ds.swapaxes(-1, -2), q)), mx.array(dv)

    return cast(mx.array, forward(q, k, v))


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
) -> mx.array:
    """softmax(q @ k.T * scale + mask) @ v: q (B, heads, rows, D); k, v (B, kv_heads, length, D).

    mask as in `mx.fast.scaled_dot_product_attention`; attention sinks are left to that function.
    """
    if sinks is not None:
        return _attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = mx.repeat(k, repeats, axis=1), mx.repeat(v, repeats, axis=1)
    if isinstance(mask, str):
        rows, length = q.shape[2], k.shape[2]
        mask = mx.arange(length - rows, length)[:, None] >= mx.arange(length)[None]
    if mask is not None and mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -math.inf)
    added = None if mask is None else host(mask)
    return _attend(added, q * scale, k, v).astype(q.dtype)


class _Held:
    """Weights unpacked so far, by identity of their layer, and the bytes that may still be held."""

    def __init__(self) -> None:
        self.weights: dict[int, tuple[Any, np.ndarray]] = {}
        self.left = 0.0


_held = _Held()


def spare_bytes() -> float:
    """What may be held in the memory that is available now."""
    return HELD_FRACTION * float(psutil.virtual_memory().available)


@contextmanager
def holding(limit_bytes: float) -> Iterator[None]:
    """Keep weights once they are unpacked in this block, up to so many bytes.

    Of a pass over 30 rows unpacking is the larger part, over 256 rows a third.
    """
    _held.left = limit_bytes
    try:
        yield
    finally:
        _held.left = 0.0
        _held.weights.clear()


@contextmanager
def many_rows(heads: bool = True) -> Iterator[None]:
    """In this block MLX's stock layers and attention run through BLAS, if the device is the CPU.

    heads: also a tied embedding's use as head; without, that product stays lazy, so that a pass that
    only fills a cache never computes it.
    """
    if not on_cpu():
        yield
        return
    replaced: list[tuple[Any, str, Any]] = [
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx.fast, "rms_norm", hooks_cpu.STOCK["rms_norm"]),  # ours have no gradient
        (mx.fast, "rope", hooks_cpu.STOCK["rope"]),
        (nn.Linear, "__call__", lambda self, x: _plain(x, host(self.weight), self.get("bias"))),
        (nn.QuantizedLinear, "__call__", lambda self, x: _plain(x, unpacked(self), self.get("bias"))),
    ]
    if heads:
        replaced += [
            (nn.Embedding, "as_linear", lambda self, x: _plain(x, host(self.weight), None)),
            (nn.QuantizedEmbedding, "as_linear", lambda self, x: _plain(x, unpacked(self), None)),
        ]
    with foreign.replaced(replaced):
        yield
