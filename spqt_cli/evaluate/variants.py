"""The variants of a model that an evaluation compares.

They are the unquantized source, MLX's own quantization of it (row-grouped), the converted model run dense,
and the converted model at each sparsity. The first two are computed in memory from what `spqt convert` reads:
a folder, a hub id or a .gguf file. This module measures nothing.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.convert import source, source_model
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.evaluate.report import ROWS, SOURCE
from spqt_cli.format import config_json, thresholds

WINDOW = 512  # tokens, where none are asked for
MOST_RENAMED = 0.01  # of the tokens: tools that write .gguf files spell a few special ones anew
OnProgress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """windows: how many of the text's first are scored; window: tokens each, half of them prompt; None: 512,
    or what the model's context allows.

    sparsity: None for the calibrated one, a number, a list "0.25,0.4" or a sweep "0.1:0.7:0.1".
    baseline: the unquantized source (folder, hub id or .gguf file), measured too. rows: with a
    baseline, measure MLX's row-grouped quantization of it as well, each layer's bits and group size equal.
    source_head: with a baseline, take embedding and head from it, so that only the blocks differ.
    limit: of a file of questions, answer only so many.
    """

    windows: int = 8
    window: int | None = None
    sparsity: str | None = None
    baseline: str | None = None
    rows: bool = False
    source_head: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Choice:
    """Thresholds to measure, by layer path, and the sparsity they are meant to reach."""

    sparsity: float
    thresholds: Mapping[str, float]


def check(options: EvaluateOptions) -> None:
    """Raise UsageError for options that contradict one another."""
    window = WINDOW if options.window is None else options.window
    if options.windows < 1 or window < 4:
        raise UsageError(
            f"{options.windows} windows of {window} tokens", "use at least 1 of at least 4 tokens"
        )
    if (options.rows or options.source_head) and options.baseline is None:
        raise UsageError("row-grouped layers and heads come from the source", "name it: --baseline SOURCE")


def stored(loaded: session.Loaded, asked: str | None) -> dict[str, Choice]:
    """Name -> thresholds of every sparsity asked for, from a model's calibration."""
    return {
        f"{sparsity:.0%}" if round(sparsity, 2) == sparsity else f"{sparsity:.2%}": Choice(
            sparsity, loaded.folder.thresholds(sparsity)
        )
        for sparsity in _sparsities(asked, loaded)
    }


def _sparsities(asked: str | None, loaded: session.Loaded) -> list[float]:
    """The sparsities to measure, each with thresholds to be had."""
    calibration = loaded.folder.calibration
    if asked is None:
        return [calibration.sparsity] if calibration and calibration.sparsity else []
    sparsities = parse_sparsities(asked)
    if sparsities and calibration is None:
        raise UsageError(f"{loaded.folder} has no thresholds yet", f"spqt calibrate {loaded.folder}")
    return sparsities


def parse_sparsities(asked: str) -> list[float]:
    """ "0.25" -> [0.25]; "0.25,0.4"; "0.1:0.7:0.1" (first, last, step) -> 0.1, 0.2, ... 0.7."""
    try:
        if ":" in asked:
            first, last, step = (float(part) for part in asked.split(":"))
            if not step > 0 or not 0 <= first <= last <= thresholds.MAX_SPARSITY:
                raise ValueError
            count = math.floor((last - first) / step + 1e-9) + 1
            sparsities = [round(first + i * step, 6) for i in range(min(count, 1000))]
        else:
            sparsities = [float(part) for part in asked.split(",")]
    except ValueError:
        sparsities = [math.nan]
    if not all(0 <= sparsity <= thresholds.MAX_SPARSITY for sparsity in sparsities):
        raise UsageError(f"{asked!r} is not a sparsity", "0.25, a list 0.25,0.4 or a sweep 0.1:0.7:0.1")
    return [sparsity for sparsity in dict.fromkeys(sparsities) if sparsity]


def others(loaded: session.Loaded, options: EvaluateOptions, on_progress: OnProgress) -> dict[str, nn.Module]:
    """Name -> the models to compare with: the source and its row-grouped form, if asked for.

    With `source_head` the converted model's own head is replaced too. Raises SpqtError, before a weight of
    the source is read, where its tokens are not the converted model's.
    """
    found: dict[str, nn.Module] = {}
    if options.baseline is None:
        return found
    sizes = ("vocab_size", "hidden_size") if options.source_head else ("vocab_size",)
    check_source(options.baseline, loaded, sizes)
    on_progress(0, 1, "loading the source")
    found[SOURCE] = source_model.load(options.baseline)
    if options.rows:
        found[ROWS] = source_model.load(options.baseline, source_model.settings_of(loaded.model))
    if options.source_head:
        for quantized in (loaded.model, *(found[name] for name in (ROWS,) if name in found)):
            take_heads(quantized, heads(found[SOURCE]))
    return found


def heads(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> embedding and head of a model."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) or path.endswith("lm_head")
    }


def take_heads(model: nn.Module, unquantized: Mapping[str, nn.Module]) -> None:
    """Put the source's embedding and head, as `heads` gives them, in the place of a quantized model's."""
    model.update_modules(tree_unflatten([(path, unquantized[path]) for path in heads(model)]))


def load_peer(name: str) -> nn.Module:
    """A model's folder (or hub id) as mlx-lm loads it, whatever its quantization; float32 on the CPU."""
    checkpoint = source_model.open_source(name)
    if checkpoint.gguf is not None:
        raise SpqtError(f"{name} is no folder that mlx-lm loads", "name a model's folder or a hub id")
    network, _ = session.load_stock(checkpoint.folder, config_json.read_config(checkpoint.folder))
    if mx.default_device().type == mx.DeviceType.cpu:
        network.set_dtype(mx.float32)
    return network


def check_source(name: str, loaded: session.Loaded, sizes: Sequence[str] = ("vocab_size",)) -> None:
    """Refuse a source whose tokens are not the converted model's: no distance between the two means anything.

    sizes: of config.json that must be equal too. No weight is read. Raises SpqtError with what differs.
    """
    checkpoint = source_model.open_source(name, headers_only=True)
    hint = f"name the source of {loaded.folder}"
    for size in sizes:
        theirs, ours = config_json.size(checkpoint.config, size), loaded.folder.size(size)
        if theirs != ours:
            raise SpqtError(f"{name} has a {size} of {theirs}, {loaded.folder} of {ours}", hint)
    check_tokens(name, _vocabulary(checkpoint), loaded, hint)


def check_tokens(name: str, vocabulary: Mapping[str, int], loaded: session.Loaded, hint: str) -> None:
    """Refuse a model whose tokens (text -> number) are not those of `loaded`. Raises SpqtError."""
    named = {token: text for text, token in loaded.tokenizer.get_vocab().items()}
    shared = {text: token for text, token in vocabulary.items() if token in named}
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
