"""The `stock` backend: MLX's own matmul on the masked input. Same mask, same numbers, no speed-up."""

import sys
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from spqt_cli.backends.interface import Backend, Calls, Experts, ExpertsStep, Projection, Step
from spqt_cli.format import layout


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """As `select.sparse_gemv`; the definition that every other backend is held against."""
    masked = [x if layer.threshold is None else layout.mask(x, layer.threshold) for layer in layers]
    outputs = [matmul(one, layer) for one, layer in zip(masked, layers, strict=True)]
    return outputs, mx.stack([_active(x, layer) for layer in layers])


def sparse_rows(
    x: mx.array, layers: Sequence[Projection], product: Callable[..., mx.array] | None = None
) -> tuple[list[mx.array], mx.array]:
    """As `select.sparse_rows`: rows are masked, and all weights read, by `product`."""
    rows = x.reshape(-1, x.shape[-1])
    masked = [x if layer.threshold is None else layout.mask(x, layer.threshold) for layer in layers]
    outputs = [(product or matmul)(one, layer) for one, layer in zip(masked, layers, strict=True)]
    return outputs, mx.stack([active_rows(rows, layer) for layer in layers])


def active_rows(x: mx.array, layer: Projection) -> mx.array:
    """The active channels of each row of x, (rows, inputs): (rows,) uint32."""
    if layer.threshold is None:
        return mx.full((len(x),), x.shape[1], mx.uint32)
    return (x.shape[1] - layout.inactive(x, layer.threshold).sum(axis=1)).astype(mx.uint32)


def _active(x: mx.array, layer: Projection) -> mx.array:
    if layer.threshold is None:
        return mx.array(x.size, mx.uint32)
    return (x.size - layout.inactive(x, layer.threshold).sum()).astype(mx.uint32)


def prepare(layers: Sequence[Projection]) -> Step:
    """As `select.prepare`."""
    return lambda x, counted: add_counts(sparse_gemv(x, layers), counted)


def prepare_experts(layers: Sequence[Experts]) -> ExpertsStep:
    """As `select.prepare_experts`; the definition that every other backend is held against."""

    def step(
        x: mx.array, indices: mx.array, counted: mx.array | None
    ) -> tuple[list[mx.array], mx.array | None]:
        skipping = [layer.threshold is not None for layer in layers]
        masked = [
            layout.mask(x, layer.threshold) if skips else x
            for layer, skips in zip(layers, skipping, strict=True)
        ]
        outputs = [
            experts_matmul(one, indices, layer, False) for one, layer in zip(masked, layers, strict=True)
        ]
        if counted is None:
            return outputs, None
        rows = x.reshape(-1, x.shape[-1])
        each = indices.size // len(rows) or 1
        return outputs, counted + mx.stack([active_rows(rows, layer).sum() * each for layer in layers])

    return step


def experts_matmul(x: mx.array, indices: mx.array, layer: Experts, sorted_indices: bool) -> mx.array:
    """As `select.experts_matmul`."""
    y = layout.gather_matmul(
        x,
        indices,
        layer.weight,
        layer.scales,
        layer.biases,
        outputs=layer.outputs,
        bits=layer.bits,
        group_size=layer.group_size,
        sorted_indices=sorted_indices,
    )
    bias = layer.get("bias")
    return y if bias is None else y + mx.expand_dims(bias[indices], -2)


def spread(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
    """x (..., rows, inputs) and indices (...) with the leading axes that both have broadcast."""
    if x.shape[:-2] == indices.shape:
        return x, indices
    wide, indices = mx.broadcast_arrays(x[..., 0, 0], indices)
    return mx.broadcast_to(x, (*wide.shape, *x.shape[-2:])), indices


def find() -> Backend:
    """This backend: it runs on every device."""
    return found("MLX's own matmul runs on every device")


def found(reason: str) -> Backend:
    """This backend, for a reason."""
    return Backend("stock", reason, cast(Calls, sys.modules[__name__]), sums_in_half=True)


def arrange(layers: Sequence[Projection]) -> None:
    """As `select.arrange`: the arrays stay as they are."""


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


def matmul_transposed(y: mx.array, layer: Projection) -> mx.array:
    """As `select.matmul_transposed`: y (..., outputs) -> (..., inputs)."""
    packed = (layer.weight, layer.scales, layer.biases)
    return layout.matmul_transposed(y, *packed, bits=layer.bits, group_size=layer.group_size)
