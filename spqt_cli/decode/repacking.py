"""Zigzag layers back in MLX's own row-grouped layout, at the price of a second rounding."""

import math
import time
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.decode.layers import ZigzagLinear


def can_repack(unit: Any) -> bool:
    """Whether stock MLX can hold a unit's layers quantized: inputs in whole groups."""
    return all(layer.inputs % layer.group_size == 0 for layer in unit.layers.values())


def repack(model: nn.Module, layers: dict[str, ZigzagLinear]) -> str:
    """Put row-grouped layers in the place of these; what it cost, for people."""
    start = time.perf_counter()
    new, errors = [], []
    for name, layer in layers.items():
        stock, error = row_grouped(layer)
        new.append((name, stock))
        errors.append(error)
    model.update_modules(tree_unflatten(new))
    mx.clear_cache()
    worst = f"relative error of the weights {math.fsum(errors) / len(errors):.1%} on average"
    return f"; repacking took {time.perf_counter() - start:.1f} s, {worst}"


def row_grouped(layer: ZigzagLinear) -> tuple[nn.QuantizedLinear, float]:
    """(MLX's own layer with these weights quantized anew along the rows, evaluated; relative L2 error).

    The error is against the Zigzag weights: quantizing twice costs a second rounding.
    """
    dtype = layer.scales.dtype
    if mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    w = layer.dequantized().astype(dtype)
    stock = nn.QuantizedLinear(layer.group_size, layer.group_size, False, layer.group_size, layer.bits)
    stock.weight, stock.scales, stock.biases = mx.quantize(w, layer.group_size, layer.bits)
    if "bias" in layer:
        stock.bias = layer.bias
    back = mx.dequantize(stock.weight, stock.scales, stock.biases, layer.group_size, layer.bits)
    exact = w.astype(mx.float32)
    error = mx.linalg.norm(back.astype(mx.float32) - exact) / mx.maximum(mx.linalg.norm(exact), 1e-30)
    mx.eval(stock.parameters(), error)
    return stock, np.array(error).item()
