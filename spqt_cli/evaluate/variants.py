"""The variants that an evaluation compares: the source, MLX's layout, dense Zigzag, and shares skipped.

What is measured on them, text windows or questions, is other modules' business.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.decode import session
from spqt_cli.errors import UsageError
from spqt_cli.evaluate import reference
from spqt_cli.evaluate.report import ROWS, SOURCE
from spqt_cli.format import thresholds

OnProgress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """windows: how many of the text's first are scored; window: tokens each, half of them prompt.

    sparsity: None for the calibrated share, a share, a list "0.25,0.4" or a sweep "0.1:0.7:0.1".
    baseline: the unquantized source (folder, hub id or .gguf file), measured too. rows: with a
    baseline, measure MLX's row-grouped quantization of it as well, each layer's bits and group size equal.
    source_head: with a baseline, take embedding and head from it, so that only the blocks differ.
    limit: of a file of questions, answer only so many.
    """

    windows: int = 8
    window: int = 512
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
    if options.windows < 1 or options.window < 4:
        raise UsageError(
            f"{options.windows} windows of {options.window} tokens", "use at least 1 of at least 4 tokens"
        )
    if (options.rows or options.source_head) and options.baseline is None:
        raise UsageError("row-grouped layers and heads come from the source", "name it: --baseline SOURCE")


def stored(loaded: session.Loaded, asked: str | None) -> dict[str, Choice]:
    """Name -> thresholds of every share asked for, from a model's calibration."""
    return {
        f"{share:.0%}" if round(share, 2) == share else f"{share:.2%}": Choice(
            share, loaded.folder.thresholds(share)
        )
        for share in _shares(asked, loaded)
    }


def _shares(asked: str | None, loaded: session.Loaded) -> list[float]:
    """The sparsities to measure, each with thresholds to be had."""
    calibration = loaded.folder.calibration
    if asked is None:
        return [calibration.sparsity] if calibration and calibration.sparsity else []
    shares = parse_shares(asked)
    if shares and calibration is None:
        raise UsageError(f"{loaded.folder} has no thresholds yet", f"spqt calibrate {loaded.folder}")
    return shares


def parse_shares(asked: str) -> list[float]:
    """ "0.25" -> [0.25]; "0.25,0.4"; "0.1:0.7:0.1" (first, last, step) -> 0.1, 0.2, ... 0.7."""
    try:
        if ":" in asked:
            first, last, step = (float(part) for part in asked.split(":"))
            if not step > 0 or not 0 <= first <= last <= thresholds.MAX_SPARSITY:
                raise ValueError
            count = math.floor((last - first) / step + 1e-9) + 1
            shares = [round(first + i * step, 6) for i in range(min(count, 1000))]
        else:
            shares = [float(part) for part in asked.split(",")]
    except ValueError:
        shares = [math.nan]
    if not all(0 <= share <= thresholds.MAX_SPARSITY for share in shares):
        raise UsageError(f"{asked!r} is no sparsity", "0.25, a list 0.25,0.4 or a sweep 0.1:0.7:0.1")
    return [share for share in dict.fromkeys(shares) if share]


def others(loaded: session.Loaded, options: EvaluateOptions, on_progress: OnProgress) -> dict[str, nn.Module]:
    """Name -> the models beside the converted one: the source and its row-grouped form, if asked for.

    With `source_head` the converted model's own head is replaced too. Raises SpqtError, before a weight of
    the source is read, where its tokens are not the converted model's.
    """
    found: dict[str, nn.Module] = {}
    if options.baseline is None:
        return found
    sizes = ("vocab_size", "hidden_size") if options.source_head else ("vocab_size",)
    reference.check(options.baseline, loaded, sizes)
    on_progress(0, 1, "loading the source")
    found[SOURCE] = reference.load(options.baseline)
    if options.rows:
        found[ROWS] = reference.load(options.baseline, reference.settings(loaded.model))
    if options.source_head:
        for quantized in (loaded.model, *(found[name] for name in (ROWS,) if name in found)):
            _take_heads(quantized, found[SOURCE])
    return found


def _take_heads(model: nn.Module, source: nn.Module) -> None:
    """Put the source's embedding and head in the place of a quantized model's."""
    modules = dict(source.named_modules())
    heads = [
        (path, modules[path])
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedEmbedding) or path.endswith("lm_head")
    ]
    model.update_modules(tree_unflatten(heads))
