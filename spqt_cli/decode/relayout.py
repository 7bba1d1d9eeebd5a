"""The head of a model (logits from the last hidden state) in the Zigzag layout, always dense.

A vocabulary of 128k makes the head as large as several layers. Nothing of it is skipped, but on some
devices the Zigzag kernel reads it faster than stock MLX. Knows the two places where mlx-lm's models keep
a head: `lm_head`, or an embedding used as one.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.backends import select
from spqt_cli.format import layout


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


def find(model: nn.Module) -> Head | None:
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


class ZigzagHead(nn.Module):
    """A head whose weights are quantized anew in the Zigzag layout; a `interface.Projection`."""

    def __init__(self, module: nn.QuantizedLinear | nn.QuantizedEmbedding) -> None:
        super().__init__()
        w = _rows(module)
        self.outputs, self.bits, self.group_size = w.shape[0], module.bits, module.group_size
        band = layout.band_of(self.outputs, self.group_size)
        self.weight, self.scales, self.biases = layout.quantize(w, self.bits, self.group_size, band)
        mx.eval(self.parameters())
        self.freeze()

    @property
    def threshold(self) -> None:
        """None: all channels are used."""
        return None

    def __call__(self, x: mx.array) -> mx.array:
        return select.matmul(x, self)

    def error_against(self, module: nn.QuantizedLinear | nn.QuantizedEmbedding) -> float:
        """The relative L2 distance of these weights from a module's."""
        exact = _rows(module).astype(mx.float32)
        packed = (self.weight, self.scales, self.biases)
        sizes = {"outputs": self.outputs, "bits": self.bits, "group_size": self.group_size}
        ours = layout.dequantize(*packed, **sizes).astype(mx.float32)
        return float(np.array(mx.linalg.norm(ours - exact) / mx.linalg.norm(exact)))


def _rows(module: Any) -> mx.array:
    return mx.dequantize(module.weight, module["scales"], module["biases"], module.group_size, module.bits)


class EmbeddingWithHead(nn.QuantizedEmbedding):
    """A tied embedding: rows are looked up in the stock layout, logits come from a ZigzagHead."""

    def __init__(self, embedding: nn.QuantizedEmbedding, head: ZigzagHead) -> None:
        nn.Module.__init__(self)
        dict.update(self, embedding)  # its arrays, not copies
        for name in ("num_embeddings", "dims", "group_size", "bits", "mode"):
            setattr(self, name, getattr(embedding, name))
        self.head = head
        self.freeze()

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def build(head: Head) -> "ZigzagHead | EmbeddingWithHead":
    """What takes the place of the head's module to have it in the Zigzag layout; evaluated."""
    zigzag = ZigzagHead(head.module)
    embedding = head.module if isinstance(head.module, nn.QuantizedEmbedding) else None
    return zigzag if embedding is None else EmbeddingWithHead(embedding, zigzag)


def to_zigzag(model: nn.Module, head: Head) -> float:
    """Put the head into the Zigzag layout; the relative L2 error that quantizing it anew cost."""
    new = build(head)
    zigzag = new if isinstance(new, ZigzagHead) else new.head
    model.update_modules(tree_unflatten([(head.path, new)]))
    mx.clear_cache()
    return zigzag.error_against(head.module)
