"""The `stock` backend: MLX's own matmul on the masked input. Same mask, same numbers, no speed-up."""

import sys
from collections.abc import Sequence

import mlx.core as mx

from spqt_cli.backends.interface import Backend, Norm, Projection, Rotary, Step, Tail
from spqt_cli.format import layout


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """As `select.sparse_gemv`; the definition that every other backend is held against."""
    masked = [x if layer.threshold is None else layout.mask(x, layer.threshold) for layer in layers]
    outputs = [matmul(one, layer) for one, layer in zip(masked, layers, strict=True)]
    return outputs, mx.stack([_active(x, layer) for layer in layers])


def _active(x: mx.array, layer: Projection) -> mx.array:
    if layer.threshold is None:
        return mx.array(x.size, mx.uint32)
    return (x.size - layout.inactive(x, layer.threshold).sum()).astype(mx.uint32)


def prepare(layers: Sequence[Projection]) -> Step:
    """As `select.prepare`."""
    return lambda x, counted: add_counts(sparse_gemv(x, layers), counted)


def found(reason: str) -> Backend:
    """This backend, for a reason."""
    return Backend("stock", reason, sys.modules[__name__], fuses=False, sums_in_half=True)


def arrange(layers: Sequence[Projection]) -> None:
    """As `select.arrange`: nothing to do."""


def prepare_gated(x: mx.array, pair: Sequence[Projection], down: Projection) -> None:
    """As `select.prepare_gated`: there is none, as for the other steps of several products."""


def prepare_head(norm: Norm, layers: Sequence[Projection]) -> None:
    """As `select.prepare_head`: there is none."""


def prepare_rotary(x: mx.array, norm: Norm, layers: Sequence[Projection], rotary: Rotary) -> None:
    """As `select.prepare_rotary`: there is none."""


def prepare_tail(x: mx.array, tail: Tail) -> None:
    """As `select.prepare_tail`: there is none."""


def add_counts(
    result: tuple[list[mx.array], mx.array], counted: mx.array | None
) -> tuple[list[mx.array], mx.array]:
    """A product's outputs, its counts added to earlier ones."""
    outputs, active = result
    return outputs, active if counted is None else counted + active


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """As `select.matmul`: x (..., inputs) -> (..., outputs)."""
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
