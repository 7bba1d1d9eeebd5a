"""`spqt eval`: what quantization and sparsity cost on a text, as decoding would meet it.

The text is cut into windows. The first half of each is a prompt, run dense; the predictions of the
second half are scored, computed with many rows masked at once instead of one by one. It measures and
writes nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli import format, model, observe, reference, scoring, texts, thresholds
from spqt_cli.errors import UsageError
from spqt_cli.quality import DENSE, ROWS, SOURCE, Quality, Variant, report

__all__ = ["EvaluateOptions", "Quality", "Variant", "evaluate", "parse_shares", "report"]

OnProgress = Callable[[float, float, str], None]
BATCH = 2  # windows at once: logits of large vocabularies are what fills memory


@dataclass(frozen=True)
class EvaluateOptions:
    """windows: how many of the text's first are scored; window: tokens each, half of them prompt.

    sparsity: None for the calibrated share, a share, a list "0.25,0.4" or a sweep "0.1:0.7:0.1".
    baseline: the unquantized source (folder, hub id or .gguf file), measured too. rows: with a
    baseline, measure MLX's row-grouped quantization of it as well, same bits and group size.
    source_head: with a baseline, take embedding and head from it, so that only the blocks differ.
    """

    windows: int = 8
    window: int = 512
    sparsity: str | None = None
    baseline: str | None = None
    rows: bool = False
    source_head: bool = False


@dataclass(frozen=True)
class Choice:
    """Thresholds to measure, by layer path, and the sparsity they are meant to reach."""

    sparsity: float
    thresholds: Mapping[str, float]


def evaluate(path: str | Path, text: Path, options: EvaluateOptions, on_progress: OnProgress) -> Quality:
    """Score a converted model on a text: dense and at each sparsity, against dense and its source.

    Raises SpqtError for a text that can't be read or is too short, UsageError for bad options.
    """
    _check(options)
    loaded = model.load(path, dense=True)
    entries = format.entries(loaded.config)
    choices = {
        f"{share:.0%}" if round(share, 2) == share else f"{share:.2%}": Choice(
            share, {layer: _threshold(entry, share, loaded) for layer, entry in entries.items()}
        )
        for share in _shares(options.sparsity, loaded)
    }
    return evaluate_choices(loaded, text, options, choices, on_progress)


def evaluate_choices(
    loaded: model.Loaded,
    text: Path,
    options: EvaluateOptions,
    choices: Mapping[str, Choice],
    on_progress: OnProgress,
) -> Quality:
    """As `evaluate`, for thresholds that need not be stored: name -> Choice, beside dense."""
    document = texts.read(text)
    stream = texts.tokens(document, loaded.tokenizer)
    rows = texts.windows(stream, options.window, texts.opening(loaded.tokenizer))
    texts.need(rows, options.windows, document)
    return _Evaluation(loaded, options, choices, on_progress).run(rows[: options.windows], document)


def _check(options: EvaluateOptions) -> None:
    if options.windows < 1 or options.window < 4:
        raise UsageError(
            f"{options.windows} windows of {options.window} tokens", "use at least 1 of at least 4 tokens"
        )
    if (options.rows or options.source_head) and options.baseline is None:
        raise UsageError("row-grouped layers and heads come from the source", "name it: --baseline SOURCE")


def _shares(asked: str | None, loaded: model.Loaded) -> list[float]:
    """The sparsities to measure, each with thresholds to be had."""
    calibration = loaded.config["spqt"].get("calibration")
    if asked is None:
        return [calibration["sparsity"]] if calibration and calibration["sparsity"] else []
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


class _Evaluation:
    """The models of one evaluation and what was measured so far."""

    def __init__(
        self,
        loaded: model.Loaded,
        options: EvaluateOptions,
        choices: Mapping[str, Choice],
        on_progress: OnProgress,
    ) -> None:
        self.loaded, self.options, self.on_progress = loaded, options, on_progress
        self.others: dict[str, nn.Module] = {}
        if options.baseline is not None:
            on_progress(0, 1, "loading the source")
            self.others[SOURCE] = reference.load(options.baseline)
        if options.baseline is not None and options.rows:
            entry = next(iter(format.entries(loaded.config).values()))
            self.others[ROWS] = reference.load(options.baseline, (entry["bits"], entry["group_size"]))
        if options.source_head:
            for quantized in (loaded.model, *(self.others[name] for name in (ROWS,) if name in self.others)):
                _take_heads(quantized, self.others[SOURCE])
        self.choices = choices
        self.maskings = {name: observe.Masking(choice.thresholds) for name, choice in choices.items()}
        self.scores: dict[str, scoring.Scores] = {}

    def run(self, rows: np.ndarray, document: texts.Text) -> Quality:
        """rows: (windows, window) tokens."""
        with observe.probing(self.loaded.model) as harness:
            for at in range(0, len(rows), BATCH):
                self.on_progress(at, len(rows), "scoring windows")
                self._batch(harness, mx.array(rows[at : at + BATCH]))
            variants = [self._variant(name, harness) for name in self.scores]
        scored = len(rows) * (rows.shape[1] - rows.shape[1] // 2 - 1)
        folder, name = str(self.loaded.folder), Path(document.name).name
        return Quality(folder, name, document.sha256, len(rows), rows.shape[1], scored, variants)

    def _batch(self, harness: observe.Harness, window: mx.array) -> None:
        prompt, rest = mx.split(window, [window.shape[1] // 2], axis=1)
        targets = np.array(rest[:, 1:])
        references: dict[str, scoring.Reference] = {}
        for name, other in self.others.items():
            logits = observe.continuation(other, rest[:, :-1], observe.prompt_cache(other, prompt))
            self._add(name, scoring.log_probabilities(logits), targets, references)
        cache = observe.prompt_cache(self.loaded.model, prompt)
        logits = observe.continuation(self.loaded.model, rest[:, :-1], cache)
        self._add(DENSE, scoring.log_probabilities(logits), targets, references)
        for name, masking in self.maskings.items():
            harness.masking = masking
            logits = observe.continuation(self.loaded.model, rest[:, :-1], cache)
            log_p = scoring.log_probabilities(logits)
            masking.evaluate()
            harness.masking = None
            self._add(name, log_p, targets, references)

    def _add(
        self, name: str, log_p: np.ndarray, targets: np.ndarray, references: dict[str, scoring.Reference]
    ) -> None:
        self.scores.setdefault(name, scoring.Scores()).add(log_p, targets, references)
        if name in (SOURCE, DENSE):
            references[name] = scoring.Reference(log_p)

    def _variant(self, name: str, harness: observe.Harness) -> Variant:
        scores = self.scores[name]
        ppl, se, surprise = scores.perplexity()
        against = {reference: scores.against(reference) for reference in scores.divergence}
        if name not in self.maskings:
            return Variant(name, None, 0.0, ppl, se, surprise, against)
        layers = self.maskings[name].realised()
        realised = observe.weighted(layers, harness.layers)
        return Variant(name, self.choices[name].sparsity, realised, ppl, se, surprise, against, layers)


def _take_heads(model: nn.Module, source: nn.Module) -> None:
    """Put the source's embedding and head in the place of a quantized model's."""
    modules = dict(source.named_modules())
    heads = [
        (path, modules[path])
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedEmbedding) or path.endswith("lm_head")
    ]
    model.update_modules(tree_unflatten(heads))


def _threshold(entry: dict, share: float, loaded: model.Loaded) -> float:
    """The layer's threshold at a share: the calibrated one where that is what was asked."""
    if share == loaded.config["spqt"]["calibration"]["sparsity"]:
        return float(entry["spqt"]["threshold"])
    return thresholds.derive(entry["spqt"]["curve"], share)
