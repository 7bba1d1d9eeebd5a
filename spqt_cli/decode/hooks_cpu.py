"""The CPU backend behind MLX's own names: `install` makes mlx-lm's models use it.

Wraps `mx.fast`'s rms_norm, rope and scaled_dot_product_attention, `mx.logsumexp`, mlx-lm's swiglu and the
product of quantized layers.
Float32 on the CPU device takes our ops where they cover the case; all else goes through to MLX unchanged.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import cpu
from spqt_cli.decode import foreign, phase

STOCK = {name: getattr(mx.fast, name) for name in ("rms_norm", "rope", "scaled_dot_product_attention")}
_CPU = mx.DeviceType.cpu
_logsumexp = mx.logsumexp
_sigmoids = [mx.sigmoid]  # with one of these in MLX's place our swiglu stands for mlx-lm's
_as_linear = nn.QuantizedEmbedding.as_linear
_quantized_linear = nn.QuantizedLinear.__call__


class _Ring(threading.local):
    """The keys that a rotating cache gave last, until attention takes them, and the place of the oldest."""

    keys: mx.array | None = None
    oldest = 0


_ring = _Ring()


def install() -> None:
    """Put our ops behind MLX's names; doing it twice changes nothing. Needs a usable `cpu.status()`."""
    from mlx_lm.models import cache

    for owner, name, ours, _ in _places():
        foreign.replace(owner, name, ours)
    module, stock = _activations()
    if module.swiglu is stock:
        foreign.replace_everywhere(module, "swiglu", swiglu)
    kinds: tuple[Any, ...] = (cache.RotatingKVCache, cache.BatchRotatingKVCache)
    for kind in kinds:
        if kind.update_and_fetch.__module__ != __name__:
            foreign.replace(kind, "update_and_fetch", _telling(kind.update_and_fetch))


def remove() -> None:
    """Give MLX its own functions back."""
    for owner, name, _, stock in _places():
        foreign.replace(owner, name, stock)
    module, stock = _activations()
    if module.swiglu is swiglu:
        foreign.replace_everywhere(module, "swiglu", stock)


def _places() -> list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]]:
    """Where MLX keeps a function, its name there, ours and its own."""
    return [
        (mx.fast, "rms_norm", rms_norm, STOCK["rms_norm"]),
        (mx.fast, "rope", rope, STOCK["rope"]),
        (mx.fast, "scaled_dot_product_attention", attention, STOCK["scaled_dot_product_attention"]),
        (mx, "logsumexp", logsumexp, _logsumexp),
        (nn.QuantizedEmbedding, "as_linear", as_linear, _as_linear),
        (nn.QuantizedLinear, "__call__", quantized_linear, _quantized_linear),
    ]


@cache
def _activations() -> tuple[Any, Callable[..., Any]]:
    """mlx-lm's module of activations, and the swiglu that it came with."""
    from mlx_lm.models import activations

    return activations, activations.swiglu


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **kw: Any) -> mx.array:
    """As `mx.fast.rms_norm`."""
    if kw or not _ours(x) or (weight is not None and weight.dtype != mx.float32):
        return STOCK["rms_norm"](x, weight, eps, **kw)
    return cpu.rms_norm(x, weight, eps)


def rope(  # noqa: PLR0913 - the settings of mx.fast.rope
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    """As `mx.fast.rope`; ours for 4-D input, and offsets that are a whole number or one of each sequence."""
    plain = stream is None and x.ndim == 4 and (freqs is None or freqs.dtype == mx.float32)
    known = isinstance(offset, int) or (
        isinstance(offset, mx.array) and offset.dtype == mx.int32 and offset.size == x.shape[0]
    )
    if plain and known and _ours(x):
        return cpu.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)
    form: dict[str, Any] = {"traditional": traditional, "base": base, "scale": scale, "offset": offset}
    return STOCK["rope"](x, dims, **form, freqs=freqs, stream=stream)


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None, **kw: Any
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`; ours without a mask, with the causal one, and for one row
    of each sequence with one of booleans.
    """
    oldest = _oldest(k)
    plain = attends(q, k, v, **kw)
    if plain and isinstance(mask, mx.array) and q.shape[2] == 1 and _of_keys(mask, q, k):
        return cpu.attention(q, k, v, scale=scale, causal=False, mask=mask, oldest=oldest)
    if plain and not isinstance(mask, mx.array):
        oldest = oldest if q.shape[2] == 1 else 0
        return cpu.attention(q, k, v, scale=scale, causal=mask is not None, oldest=oldest)
    return STOCK["scaled_dot_product_attention"](q, k, v, scale=scale, mask=mask, **kw)


def attends(q: mx.array, k: mx.array, v: mx.array, **kw: Any) -> bool:
    """Whether `attention` is ours for these, if without a mask or with the causal one."""
    return (
        all(name in ("scale", "mask") or value is None for name, value in kw.items())
        and _ours(q)
        and k.dtype == v.dtype == mx.float32
        and cpu.attends(q, k, v)
    )


def logsumexp(x: mx.array, *args: Any, **kw: Any) -> mx.array:
    """As `mx.logsumexp`; ours over all axes at once or the last, as mlx-lm normalizes a token's logits."""
    keepdims, axis = kw.get("keepdims", False), kw.get("axis")
    others = args or kw.keys() - {"keepdims", "axis"} or axis not in (None, -1)
    if others or not isinstance(x, mx.array) or x.ndim == 0 or not _ours(x) or x.size > cpu.MOST_NUMBERS:
        return _logsumexp(x, *args, **kw)
    return cpu.log_sum_exp(x, last=axis is not None, keepdims=bool(keepdims))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """As mlx-lm's; its own where another sigmoid was put into MLX, which it asks for."""
    fits = gate.shape == x.shape and gate.dtype == x.dtype == mx.float32 and gate.size > 0
    if not (fits and _ours(gate) and mx.sigmoid in _sigmoids):
        return cast(mx.array, _activations()[1](gate, x))
    return cpu.swiglu(gate, x)


@contextmanager
def also_with(sigmoid: Callable[..., Any]) -> Iterator[None]:
    """In this block our swiglu runs with this in the place of `mx.sigmoid` as well."""
    _sigmoids.append(sigmoid)
    try:
        yield
    finally:
        _sigmoids.remove(sigmoid)


def as_linear(self: nn.QuantizedEmbedding, x: mx.array) -> mx.array:
    """As `nn.QuantizedEmbedding.as_linear`."""
    if not (_ours(x) and _affine(self)):
        return _as_linear(self, x)
    return _row_matmul(self, x)


def quantized_linear(self: nn.QuantizedLinear, x: mx.array) -> mx.array:
    """As `nn.QuantizedLinear.__call__`, for layers in MLX's own layout."""
    if not (_ours(x) and _affine(self)):
        return _quantized_linear(self, x)
    y = _row_matmul(self, x)
    return y + self["bias"] if "bias" in self else y


def _row_matmul(layer: Any, x: mx.array) -> mx.array:
    """x @ W.T of a row-grouped layer. Its gradient by x is our product as well: MLX's, which the operation
    falls back on, took 60 times as long for 256 rows of a head. By scales and biases it is MLX's.
    """
    weight, scales, biases = layer["weight"], layer["scales"], layer["biases"]
    form = layer.bits, layer.group_size
    if phase.decodes() or layer.trainable_parameters():  # the codes among them, maybe: MLX refuses those
        return cpu.head_matmul(x, weight, scales, biases, *form)
    run = mx.custom_function(lambda x, scales, biases: cpu.head_matmul(x, weight, scales, biases, *form))

    def slopes(primals: list[mx.array], slope: mx.array, _: mx.array) -> list[mx.array]:
        x, scales, biases = primals

        def stock(scales: mx.array, biases: mx.array) -> mx.array:
            return mx.quantized_matmul(
                x, weight, scales, biases, bits=layer.bits, group_size=layer.group_size
            )

        by_x = cpu.head_matmul_transposed(slope, weight, scales, biases, *form)
        return [by_x, *mx.vjp(stock, [scales, biases], [slope])[1]]

    run.vjp(slopes)
    return cast(mx.array, run(x, scales, biases))


def _telling(update: Callable[..., Any]) -> Callable[..., Any]:
    """A rotating cache's update_and_fetch, after which `_oldest` knows where its keys begin."""

    def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> Any:
        found = update(self, keys, values)
        if keys.shape[2] == 1 and not getattr(self, "keep", 0):
            _ring.keys, _ring.oldest = found[0], self._idx % found[0].shape[2]
        return found

    return update_and_fetch


def _oldest(k: mx.array) -> int:
    """Which of these keys is the oldest; asked once, because who holds the keys makes the cache copy them."""
    known, _ring.keys = _ring.keys, None
    return _ring.oldest if known is k else 0


def _of_keys(mask: mx.array, q: mx.array, k: mx.array) -> bool:
    """Whether a mask says of each key whether it is seen, for each sequence or for all."""
    each = (q.shape[0], 1, 1, k.shape[2])
    return mask.dtype == mx.bool_ and mask.shape in (each, each[-1:], (1, 1, *each[2:]), each[2:])


def _ours(x: mx.array) -> bool:
    # `is`: comparing two of an enumeration calls Python, and this runs 300 times a token
    return x.dtype == mx.float32 and x.size > 0 and mx.default_device().type is _CPU


def _affine(layer: Any) -> bool:
    return layer.mode == "affine" and layer.get("biases") is not None
