"""A backend of the smallest kind, in NumPy and float64: one module, none of the optional steps."""

import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends import accuracy, stock
from spqt_cli.backends.interface import Backend, Projection, Step

products: list[int] = []  # outputs of every product that ran here


def find() -> Backend:
    this: Any = sys.modules[__name__]
    return Backend("numpy", "registered by a test", this)


def matmul(x: mx.array, layer: Projection) -> mx.array:
    products.append(layer.outputs)
    y = accuracy.wide(x) @ accuracy.reference(layer)[0].T
    bias = layer.get("bias")
    return mx.array((y if bias is None else y + accuracy.wide(bias)).astype(np.float32)).astype(x.dtype)


def matmul_transposed(y: mx.array, layer: Projection) -> mx.array:
    return mx.array((accuracy.wide(y) @ accuracy.reference(layer)[0]).astype(np.float32)).astype(y.dtype)


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    outputs, counts = [], []
    for layer in layers:
        threshold = 0.0 if layer.threshold is None else np.array(layer.threshold)
        kept = ~(np.abs(np.array(x.astype(mx.float32))) < threshold)
        outputs.append(matmul(mx.where(mx.array(kept), x, mx.zeros_like(x)), layer))
        counts.append(int(kept.sum()))
    return outputs, mx.array(counts, mx.uint32)


def prepare(layers: Sequence[Projection]) -> Step:
    return lambda x, counted: stock.add_counts(sparse_gemv(x, layers), counted)


prepare_experts, experts_matmul = stock.prepare_experts, stock.experts_matmul


def arrange(layers: Sequence[Projection]) -> None:
    """The arrays stay as they are."""
