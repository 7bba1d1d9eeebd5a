"""The `stock` backend: MLX's own matmul on the masked input. Same mask, same numbers, no speed-up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from spqt_cli import layout

if TYPE_CHECKING:
    from spqt_cli.kernels import Projection


def sparse_gemv(x: mx.array, layers: Sequence["Projection"]) -> tuple[list[mx.array], mx.array]:
    """As `kernels.sparse_gemv`; the definition that every other backend is held against."""
    outputs = [matmul(layout.mask(x, layer.threshold), layer) for layer in layers]
    active = mx.stack([x.size - layout.inactive(x, layer.threshold).sum() for layer in layers])
    return outputs, active.astype(mx.uint32)


def matmul(x: mx.array, layer: "Projection") -> mx.array:
    """As `kernels.matmul`: x (..., inputs) -> (..., outputs)."""
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
