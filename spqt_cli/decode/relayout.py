"""A loaded model's layers in the other layout, where this device runs them faster: quantized a second time.

Zigzag layers go back to MLX's own row-grouped layout. The head (logits from the last hidden state) goes to
Zigzag, always dense: a vocabulary of 128k makes it as large as several layers. Knows the two places where
mlx-lm's models keep a head: `lm_head`, or an embedding used as one.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.decode.layers import ZigzagLinear, put_layers
from spqt_cli.format import layout


def fits_rows(layer: Any) -> bool:
    """Whether MLX can hold a layer row-grouped: inputs in whole groups."""
    return bool(layer.inputs % layer.group_size == 0)


def to_rows(model: nn.Module, layers: dict[str, ZigzagLinear]) -> str:
    """Put row-grouped layers in the place of these; returns what it cost, as text."""
    start = time.perf_counter()
    new, errors = {}, []
    for name, layer in layers.items():
        stock, error = row_grouped(layer)
        new[name] = stock
        errors.append(error)
    put_layers(model, new)
    mx.clear_cache()
    mean = f"relative error of the weights {math.fsum(errors) / len(errors):.1%} on average"
    return f"; repacking took {time.perf_counter() - start:.1f} s, {mean}"


def row_grouped(layer: ZigzagLinear) -> tuple[nn.QuantizedLinear, float]:
    """(MLX's own layer with these weights quantized anew along the rows, evaluated; relative L2 error).

    The error is against the Zigzag weights: quantizing twice costs a second rounding.
    """
    dtype = layer.scales.dtype
    if mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    w = layer.dequantized().astype(dtype)
    stock = nn.QuantizedLinear(layer.group_size, layer.group_size, False, layer.group_size, layer.bits)
    stock.weight, stock.scales, stock.biases = layout.quantize_rows(w, layer.bits, layer.group_size)
    if "bias" in layer:
        stock.bias = layer.bias
    mx.eval(stock.parameters())
    return stock, _distance(_dequantized(stock), w)


@dataclass(frozen=True)
class Head:
    """Where a model's quantized head is. tied: it is the embedding."""

    path: str
    module: nn.QuantizedLinear | nn.QuantizedEmbedding
    tied: bool

    @property
    def sizes(self) -> tuple[tuple[int, int], int, int]:
        """((outputs, inputs), bits, group size)."""
        module = self.module
        outputs, words = module.weight.shape
        return (outputs, words * 32 // module.bits), module.bits, module.group_size

    @property
    def key(self) -> str:
        """What a measurement holds for."""
        (outputs, inputs), bits, group_size = self.sizes
        return f"head {outputs}x{inputs} {bits} bits group {group_size}"


def find_head(model: nn.Module) -> Head | None:
    """A model's head, if it is one that stock MLX quantized; None otherwise."""
    embedding = None
    for path, module in model.named_modules():
        affine = getattr(module, "mode", None) == "affine"
        leaf = path.rpartition(".")[2]
        if leaf == "lm_head":
            own = type(module) is nn.QuantizedLinear and affine and "bias" not in module
            return Head(path, module, tied=False) if own else None
        if leaf == "embed_tokens" and type(module) is nn.QuantizedEmbedding and affine:
            embedding = Head(path, module, tied=True)
    return embedding


class EmbeddingWithHead(nn.QuantizedEmbedding):
    """A tied embedding: rows are looked up in the stock layout, logits come from a layer in Zigzag."""

    def __init__(self, embedding: nn.QuantizedEmbedding, head: ZigzagLinear) -> None:
        nn.Module.__init__(self)
        dict.update(self, embedding)  # its arrays, not copies
        for name in ("num_embeddings", "dims", "group_size", "bits", "mode"):
            setattr(self, name, getattr(embedding, name))
        self.head = head
        self.freeze()

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def zigzag_head(head: Head) -> ZigzagLinear | EmbeddingWithHead:
    """What takes the place of the head's module to have it in the Zigzag layout; evaluated."""
    module, w = head.module, _dequantized(head.module)
    band = layout.band_of(w.shape[0], module.group_size)
    layer = ZigzagLinear(w.shape[0], module.bits, module.group_size, band)
    layer.always_dense = True
    layer.weight, layer.scales, layer.biases = layout.quantize(w, module.bits, module.group_size, band)
    mx.eval(layer.parameters())
    layer.freeze()
    return EmbeddingWithHead(module, layer) if isinstance(module, nn.QuantizedEmbedding) else layer


def head_to_zigzag(model: nn.Module, head: Head) -> float:
    """Put the head into the Zigzag layout; the relative L2 error that quantizing it anew cost."""
    new = zigzag_head(head)
    layer = new.head if isinstance(new, EmbeddingWithHead) else new
    model.update_modules(tree_unflatten([(head.path, new)]))
    mx.clear_cache()
    return _distance(layer.dequantized(), _dequantized(head.module))


def _dequantized(module: Any) -> mx.array:
    return mx.dequantize(module.weight, module["scales"], module["biases"], module.group_size, module.bits)


def _distance(found: mx.array, exact: mx.array) -> float:
    """The relative L2 distance of two matrices."""
    a, b = found.astype(mx.float32), exact.astype(mx.float32)
    return float(np.array(mx.linalg.norm(a - b) / mx.maximum(mx.linalg.norm(b), 1e-30)))
