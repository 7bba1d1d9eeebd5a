"""The models that quality is measured against: the unquantized source, and MLX's own quantization.

They are computed from what `spqt convert` reads (a folder, a hub id or a .gguf file), in memory only.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from spqt_cli.convert import parameters, source
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from spqt_cli.format import config_json
from spqt_cli.measure import many_rows

MOST_RENAMED = 0.01  # of the tokens: tools that write .gguf files spell a few special ones anew
Settings = dict[str, tuple[int, int]]  # path of a module -> bits, group size


def load(name: str, rows: Mapping[str, tuple[int, int]] | None = None) -> nn.Module:
    """The model of a source, unquantized, or its modules in `rows` quantized as mlx-lm does, row by row.

    rows: as `settings` gives them. On the CPU it computes in float32, as converted models do.
    """
    checkpoint = source.open_source(name, None, source.Trust(requantize=True))
    network, weights, names = parameters.load(checkpoint)
    if checkpoint.gguf is not None:
        weights = {parameter: checkpoint.read(tensor) for parameter, tensor in names.items()}
    network.eval()
    network.load_weights(list(weights.items()))
    if rows is not None:
        _quantize_rows(network, rows)
    if many_rows.on_cpu():
        network.set_dtype(mx.float32)
    mx.eval(network.parameters())
    return network


def settings(network: nn.Module) -> Settings:
    """The bits and group size of every quantized module of a model, Zigzag or row-grouped."""
    return {path: (one.bits, one.group_size) for path, one in network.named_modules() if "scales" in one}


def check(name: str, loaded: session.Loaded, sizes: Sequence[str] = ("vocab_size",)) -> None:
    """Refuse a source whose tokens are not the converted model's: no distance between the two means anything.

    sizes: of config.json that must be equal too. No weight is read. Raises SpqtError with what differs.
    """
    checkpoint = source.open_source(name, None, source.Trust(requantize=True), headers_only=True)
    hint = f"name the source of {loaded.folder}"
    for size in sizes:
        theirs, ours = config_json.size(checkpoint.config, size), loaded.folder.size(size)
        if theirs != ours:
            raise SpqtError(f"{name} has a {size} of {theirs}, {loaded.folder} of {ours}", hint)
    named = {token: text for text, token in loaded.tokenizer.get_vocab().items()}
    shared = {text: token for text, token in _vocabulary(checkpoint).items() if token in named}
    other = sum(named[token] != text for text, token in shared.items())
    if other > MOST_RENAMED * len(shared):
        cause = f"{name} has another tokenizer than {loaded.folder}: {other} of {len(shared)} tokens differ"
        raise SpqtError(cause, hint)


def _vocabulary(checkpoint: source.Checkpoint) -> dict[str, int]:
    """Text -> number of every token that a source's tokenizer has."""
    if checkpoint.gguf is None:
        return dict(session.load_tokenizer(checkpoint.folder).get_vocab())
    from spqt_cli.convert.gguf.checkpoint import write_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / config_json.CONFIG).write_text(json.dumps(checkpoint.config))
        write_tokenizer(checkpoint.gguf.path, folder)
        return dict(session.load_tokenizer(folder).get_vocab())


def _quantize_rows(network: nn.Module, rows: Mapping[str, tuple[int, int]]) -> None:
    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in rows or not hasattr(module, "to_quantized") or module.weight.shape[-1] % rows[path][1]:
            return False  # no whole number of groups along the inputs: stock mlx-lm leaves it as it is
        bits, group_size = rows[path]
        return {"group_size": group_size, "bits": bits}

    nn.quantize(network, class_predicate=choose)
