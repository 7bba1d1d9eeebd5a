"""A source's own model in memory, as mlx-lm builds it: what a converted or fitted model is held against.

It owns how much of it stays unquantized; the checkpoint is `source`'s, the class and its weights' names
`parameters`'.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

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
    """As `load`, of an open checkpoint. The model knows its context's length (`context.of`).

    Modules in `rows` are read and quantized one by one, so that never more than one of them is held whole.
    """
    network, weights, names = parameters.load(checkpoint)
    network.eval()

    def read(name: str) -> mx.array:
        lazy = weights.pop(name)
        return lazy if checkpoint.gguf is None else checkpoint.read(names[name])

    if rows is not None:
        _quantize_rows(network, rows, weights, read)
    network.load_weights([(name, read(name)) for name in list(weights)], strict=rows is None)
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


def _quantize_rows(
    network: nn.Module,
    rows: Mapping[str, tuple[int, int]],
    weights: Mapping[str, mx.array],
    read: Callable[[str], mx.array],
) -> None:
    """Exchange the modules in `rows` for quantized ones; `read` takes their weights out of `weights`."""
    twins = []
    for path, module in network.named_modules():
        bits, group_size = rows.get(path, (0, 1))
        if not bits or not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            continue  # no whole number of groups along the inputs: stock mlx-lm leaves it as it is
        module.update({name: read(f"{path}.{name}") for name in list(module) if f"{path}.{name}" in weights})
        twins.append((path, module.to_quantized(group_size, bits)))
        mx.eval(twins[-1][1].parameters())
        module.update({name: mx.zeros(()) for name in list(module) if isinstance(module[name], mx.array)})
    network.update_modules(tree_unflatten(twins))
