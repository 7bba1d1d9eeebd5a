"""Many-row products on the CPU by numpy's BLAS, for calibration and evaluation.

MLX's own CPU build multiplies at a few GFLOP/s on one thread; numpy's bundled BLAS is tens of times
faster on the same machine. Results are computed when called, not lazily, and can be differentiated.
On a GPU everything here steps aside and MLX's own operations run. It knows nothing of calibration.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import mlx.core as mx
import numpy as np
import psutil
from mlx import nn

from spqt_cli.decode import foreign, hooks_cpu
from spqt_cli.format import layout
from spqt_cli.measure import attention as by_blocks
from spqt_cli.measure.attention import from_host, host

HELD_FRACTION = 0.3  # of the available memory, for weights held unpacked

_attention = hooks_cpu.STOCK["scaled_dot_product_attention"]


def on_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def linear(x: mx.array, layer: Any) -> mx.array:
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


def experts(x: mx.array, indices: mx.array, layer: Any, sorted_indices: bool = False) -> mx.array:
    """y of x by the Zigzag experts `indices`, no channel skipped: as `layout.gather_matmul`, and with bias.

    Can be differentiated with respect to x on every backend.
    """
    if on_cpu():
        y = _by_expert(x, indices, layer)
    else:
        packed = (layer["weight"], layer["scales"], layer["biases"])
        form = {"outputs": layer.outputs, "bits": layer.bits, "group_size": layer.group_size}
        y = layout.gather_matmul(x, indices, *packed, **form, sorted_indices=sorted_indices)
    bias = layer.get("bias")
    return y if bias is None else y + mx.expand_dims(bias[indices], -2)


def _by_expert(x: mx.array, indices: mx.array, layer: Any) -> mx.array:
    leading = np.broadcast_shapes(x.shape[:-2], indices.shape)
    rows = mx.broadcast_to(x, (*leading, *x.shape[-2:])).reshape(-1, x.shape[-1])
    chosen = np.broadcast_to(np.array(indices), leading)
    each = np.repeat(chosen.reshape(-1), x.shape[-2])
    parts = [(expert, np.flatnonzero(each == expert)) for expert in np.unique(each).tolist()]
    y = _banded(rows, layer, parts)
    return y.reshape(*leading, x.shape[-2], layer.outputs).astype(x.dtype)


# Which rows which matrix of a layer takes: (its expert, the rows' numbers).
Parts = Sequence[tuple[int | None, Any]]
ALL: Parts = ((None, slice(None)),)


def _banded(rows: mx.array, layer: Any, parts: Parts = ALL) -> mx.array:
    # The weights, (bands, inputs, band), are unpacked anew in the backward pass: holding all layers' would
    # not fit memory.
    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        values, y = host(x), np.empty((x.shape[0], layer.outputs), np.float32)
        for expert, some in parts:
            product = np.matmul(values[some], unpacked(layer, expert)).swapaxes(0, 1)  # (rows, bands, band)
            y[some] = product.reshape(product.shape[0], -1)[:, : layer.outputs]
        return from_host(y)

    @forward.vjp
    def backward(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        slopes, dx = host(cotangent), np.empty(x.shape, np.float32)
        for expert, some in parts:
            w = unpacked(layer, expert)
            bands, _, band = w.shape
            dy = np.zeros((len(slopes[some]), bands * band), np.float32)
            dy[:, : layer.outputs] = slopes[some]
            dx[some] = sum(dy[:, b * band : (b + 1) * band] @ w[b].T for b in range(bands))
        return from_host(dx)

    return cast(mx.array, forward(rows))


def _plain(x: mx.array, w: np.ndarray, bias: mx.array | None) -> mx.array:
    """x @ w.T + bias, w (outputs, inputs): what a stock layer computes; differentiable in x alone."""

    @mx.custom_function
    def forward(rows: mx.array) -> mx.array:
        return from_host(host(rows) @ w.T)

    @forward.vjp
    def backward(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return from_host(host(cotangent) @ w)

    product = cast(mx.array, forward(x.reshape(-1, x.shape[-1])))
    y = product.reshape(*x.shape[:-1], w.shape[0]).astype(x.dtype)
    return y if bias is None else y + bias


def unpacked(layer: Any, expert: int | None = None) -> np.ndarray:
    """The weights of a quantized layer, or of one of its experts: float32, groups along the last axis; those
    of `holding`, if any.
    """
    held = _held.weights.get((id(layer), expert))
    if held is not None:
        return held[1]
    w = _unpack(layer, ... if expert is None else expert)
    if w.nbytes <= _held.left:
        _held.left -= w.nbytes
        _held.weights[id(layer), expert] = (layer, w)  # with the layer, whose id must not be given to another
    return w


def _unpack(layer: Any, which: Any) -> np.ndarray:
    """3, 5 and 6 bits by numpy: MLX's CPU build takes twice as long for codes that straddle bytes."""
    if layer.mode not in ("affine", "zigzag"):
        scales = (layer.scales, layer.get("biases"))
        return host(mx.dequantize(layer.weight, *scales, layer.group_size, layer.bits, mode=layer.mode))
    weight = layer.weight[which]
    scales, biases = (layer[name][which].astype(mx.float32) for name in ("scales", "biases"))
    if layer.bits not in (3, 5, 6):
        return host(mx.dequantize(weight, scales, biases, layer.group_size, layer.bits))
    w = codes(np.array(weight, copy=False), layer.bits).astype(np.float32)
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


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`; attention sinks are left to that function."""
    if sinks is not None:
        return _attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return by_blocks.attention(q, k, v, scale=scale, mask=mask)


def sigmoid(a: mx.array) -> mx.array:
    """As `mx.sigmoid`."""
    return _elementwise(a, _sigmoid, lambda y: y * (1 - y))


def tanh(a: mx.array) -> mx.array:
    """As `mx.tanh`."""
    return _elementwise(a, np.tanh, lambda y: 1 - y * y)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    y = np.negative(x)
    with np.errstate(over="ignore"):  # exp(-x) becomes inf, and the sigmoid 0
        np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def _elementwise(
    a: mx.array, function: Callable[[np.ndarray], np.ndarray], slope: Callable[[np.ndarray], np.ndarray]
) -> mx.array:
    """function(a) by numpy, whose exp takes a fourth of the time of MLX's. slope: from its value."""

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return from_host(function(host(x)))

    @forward.vjp
    def backward(_: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        return cotangent * from_host(slope(host(y)))

    return cast(mx.array, forward(a)).astype(a.dtype)


class _Held:
    """Weights unpacked so far, by identity of layer and expert, and the bytes that may still be held."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int | None], tuple[Any, np.ndarray]] = {}
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
def many_rows(heads: bool = True, *, gradients: bool = True) -> Iterator[None]:
    """In this block MLX's stock layers and attention run through BLAS, if the device is the CPU.

    heads: also a tied embedding's use as head; without, that product stays lazy, so that a pass that
    only fills a cache never computes it. gradients: False where nothing is differentiated: norms, rotations
    and swiglu then are those of the CPU extension, where it runs.
    """
    if not on_cpu():
        yield
        return
    replaced: list[tuple[Any, str, Any]] = [
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx, "sigmoid", sigmoid),
        (mx, "tanh", tanh),
        (nn.Linear, "__call__", lambda self, x: _plain(x, host(self.weight), self.get("bias"))),
        (nn.QuantizedLinear, "__call__", lambda self, x: _plain(x, unpacked(self), self.get("bias"))),
    ]
    if heads:
        replaced += [
            (nn.Embedding, "as_linear", lambda self, x: _plain(x, host(self.weight), None)),
            (nn.QuantizedEmbedding, "as_linear", lambda self, x: _plain(x, unpacked(self), None)),
        ]
    if gradients:  # the extension's have none
        replaced += [(mx.fast, name, hooks_cpu.STOCK[name]) for name in ("rms_norm", "rope")]
    ours = nullcontext() if gradients else hooks_cpu.also_with(sigmoid)
    with foreign.replaced(replaced), uncompiled(), ours:
        yield


_uncompiled: list[None] = []  # one for each open block: the outermost lets MLX compile again


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled activations would not ask for ours: here, inner blocks included, they run uncompiled."""
    _uncompiled.append(None)
    mx.disable_compile()
    try:
        yield
    finally:
        _uncompiled.pop()
        if not _uncompiled:
            mx.enable_compile()
