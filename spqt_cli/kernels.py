"""Which backend multiplies, and the one call that does it.

The operation is `layout.matmul(layout.mask(x, threshold), ...)`; every backend computes exactly that.
`gpu.py` holds the Metal and CUDA kernels, `cpu.py` the C++ extension; `stock`, here, is MLX's own
matmul on the masked input: same mask, same numbers, no speed-up.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from spqt_cli import layout


class Projection(Protocol):
    """What a backend reads of a Zigzag layer.

    weight, scales, biases: as `layout.quantize` returns them; bias: (outputs,) or None;
    threshold: (1,) or (inputs,), float32.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    threshold: mx.array
    outputs: int
    bits: int
    group_size: int

    def get(self, key: str, default: Any = None) -> Any: ...


class Backend(NamedTuple):
    name: str  # metal, cuda, cpu or stock
    reason: str  # why this one, for people


@cache
def backend() -> Backend:
    """The backend of this process, chosen once: the device's own kernels where they run."""
    return Backend("stock", "no native kernel is built into this version")


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row.
    Returns y per layer, (..., outputs) in x's dtype, and the number of active channels per layer,
    (len(layers),) uint32, which costs nothing unless somebody evaluates it.
    """
    return _stock_gemv(x, layers)


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """x @ W.T + bias, all channels used: x (..., inputs) -> (..., outputs). Prefill and dense decode."""
    return _stock_matmul(x, layer)


def _stock_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    outputs = [_stock_matmul(layout.mask(x, layer.threshold), layer) for layer in layers]
    active = mx.stack([x.size - layout.inactive(x, layer.threshold).sum() for layer in layers])
    return outputs, active.astype(mx.uint32)


def _stock_matmul(x: mx.array, layer: Projection) -> mx.array:
    y = layout.matmul(
        x,
        layer.weight,
        layer.scales,
        layer.biases,
        outputs=layer.outputs,
        bits=layer.bits,
        group_size=layer.group_size,
    )
    bias = layer.get("bias")
    return y if bias is None else y + bias
