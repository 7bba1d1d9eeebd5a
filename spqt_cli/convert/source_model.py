"""A source's own model in memory, as mlx-lm builds it: what a converted or fitted model is held against.

It owns how much of it stays unquantized; the checkpoint is `source`'s, the class and its weights' names
`parameters`'.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn

from spqt_cli.convert import parameters, source
from spqt_cli.decode import context

EIGHT_BITS = (8, 64)  # bits and group size of a model that does not fit otherwise
Settings = dict[str, tuple[int, int]]  # path of a module -> bits, group size


def load(name: str, rows: Mapping[str, tuple[int, int]] | None = None) -> nn.Module:
    """The model of a source, unquantized, or its modules in `rows` quantized as mlx-lm does, row by row.

    name: a folder, hub id or .gguf file. rows: as `settings_of` or `eight_bits` give them. On the CPU it
    computes in float32, as converted models do.
    """
    return build(open_source(name), rows)


def open_source(name: str, *, headers_only: bool = False) -> source.Checkpoint:
    """As `source.open_source`; that a source is quantized itself is no hindrance here."""
    return source.open_source(name, None, source.Trust(requantize=True), headers_only=headers_only)


def build(checkpoint: source.Checkpoint, rows: Mapping[str, tuple[int, int]] | None = None) -> nn.Module:
    """As `load`, of an open checkpoint. The model knows its context's length (`context.of`)."""
    network, weights, names = parameters.load(checkpoint)
    if checkpoint.gguf is not None:
        weights = {parameter: checkpoint.read(tensor) for parameter, tensor in names.items()}
    network.eval()
    network.load_weights(list(weights.items()))
    del weights
    if rows is not None:
        _quantize_rows(network, rows)
    if mx.default_device().type == mx.DeviceType.cpu:
        network.set_dtype(mx.float32)
    mx.eval(network.parameters())
    whole: Any = network
    whole.spqt_context = context.tokens({**checkpoint.config, "spqt": checkpoint.exact or {}})
    return network


def settings_of(network: nn.Module) -> Settings:
    """The bits and group size of every quantized module of a model, Zigzag or row-grouped."""
    return {path: (one.bits, one.group_size) for path, one in network.named_modules() if "scales" in one}


def eight_bits(checkpoint: source.Checkpoint) -> Settings:
    """Settings that hold every linear layer and embedding of a source in 8 bits, for `build`."""
    network, *_ = parameters.load(checkpoint)
    return {path: EIGHT_BITS for path, one in network.named_modules() if hasattr(one, "to_quantized")}


def _quantize_rows(network: nn.Module, rows: Mapping[str, tuple[int, int]]) -> None:
    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in rows or not hasattr(module, "to_quantized") or module.weight.shape[-1] % rows[path][1]:
            return False  # no whole number of groups along the inputs: stock mlx-lm leaves it as it is
        bits, group_size = rows[path]
        return {"group_size": group_size, "bits": bits}

    nn.quantize(network, class_predicate=choose)
