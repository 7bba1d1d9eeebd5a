"""`spqt eval MODEL TEXT`: perplexity and KL divergence on a text, dense and at each sparsity.

The text is cut into windows. The first half of a window is a prompt and runs dense. The predictions of the
second half are scored; many masked rows are computed at once instead of one decode step after another, with
the same result. Nothing is written.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from spqt_cli.decode import context, session
from spqt_cli.evaluate import variants
from spqt_cli.evaluate.report import DENSE, SOURCE, Quality, Variant
from spqt_cli.evaluate.variants import Choice, EvaluateOptions, OnProgress
from spqt_cli.format.folder import Folder
from spqt_cli.measure import many_rows, probes, scoring, texts

MOST_WINDOWS = 2  # at once
LOGITS_BYTES = 256 << 20  # of one variant at once, if that is more than a window: several times it is held


def evaluate(
    path: str | Path | Folder, text: Path | None, options: EvaluateOptions, on_progress: OnProgress
) -> Quality:
    """Score a converted model on a text: dense and at each sparsity, against dense and its source.

    text: None for the shipped one. Raises SpqtError for a text that can't be read or is too short,
    UsageError for bad options.
    """
    variants.check(options)
    loaded = session.load(path, dense=True)
    return evaluate_choices(loaded, text, options, variants.stored(loaded, options.sparsity), on_progress)


def evaluate_choices(
    loaded: session.Loaded,
    text: Path | None,
    options: EvaluateOptions,
    choices: Mapping[str, Choice],
    on_progress: OnProgress,
) -> Quality:
    """As `evaluate`, for thresholds that need not be stored: name -> Choice, and dense."""
    window, note = context.window(context.tokens(loaded.config), options.window, variants.WINDOW)
    document = texts.read(text)
    rows = windows(loaded, document, options.windows, window)
    quality = _Evaluation(loaded, options, choices, on_progress).run(rows, document)
    quality.note = note
    return quality


def windows(loaded: session.Loaded, document: texts.Text, count: int, window: int) -> np.ndarray:
    """The first windows of a text in a model's tokens: (count, window). Raises SpqtError for too short."""
    stream = session.known(loaded, texts.tokens(document, loaded.tokenizer))
    rows = texts.windows(stream, window, texts.opening(loaded.tokenizer))
    texts.need(rows, count, document, len(stream), "--windows")
    return rows[:count]


class _Evaluation:
    """The models of one evaluation and what was measured so far."""

    def __init__(
        self,
        loaded: session.Loaded,
        options: EvaluateOptions,
        choices: Mapping[str, Choice],
        on_progress: OnProgress,
    ) -> None:
        self.loaded, self.options, self.on_progress = loaded, options, on_progress
        self.others = variants.others(loaded, options, on_progress)
        self.choices = choices
        self.maskings = {name: probes.Masking(choice.thresholds) for name, choice in choices.items()}
        self.scores: dict[str, scoring.Scores] = {}

    def run(self, rows: np.ndarray, document: texts.Text) -> Quality:
        """rows: (windows, window) tokens."""
        with probes.probing(self.loaded.model) as harness, many_rows.holding(many_rows.spare_bytes()):
            at, batch = 0, 1
            while at < len(rows):
                self.on_progress(at, len(rows), "scoring windows")
                one = self._batch(harness, mx.array(rows[at : at + batch])) // batch
                at += batch
                batch = max(1, min(MOST_WINDOWS, LOGITS_BYTES // one))
            found = [self._variant(name, harness) for name in self.scores]
        scored = len(rows) * (rows.shape[1] - rows.shape[1] // 2 - 1)
        folder, name = str(self.loaded.folder), Path(document.name).name
        return Quality(folder, name, document.sha256, len(rows), rows.shape[1], scored, found)

    def _batch(self, harness: probes.Harness, window: mx.array) -> int:
        """Score windows (B, window) by every variant; the bytes of one variant's logits."""
        prompt, rest = mx.split(window, [window.shape[1] // 2], axis=1)
        targets = np.array(rest[:, 1:])
        references: dict[str, scoring.Reference] = {}
        for name, other in self.others.items():
            logits = probes.continuation(other, rest[:, :-1], probes.prompt_cache(other, prompt))
            self._add(name, scoring.log_probabilities(logits), targets, references)
        cache = probes.prompt_cache(self.loaded.model, prompt)
        logits = probes.continuation(self.loaded.model, rest[:, :-1], cache)
        self._add(DENSE, scoring.log_probabilities(logits), targets, references)
        for name, masking in self.maskings.items():
            with harness.masked(masking):
                logits = probes.continuation(self.loaded.model, rest[:, :-1], cache)
                log_p = scoring.log_probabilities(logits)
                masking.evaluate()
            self._add(name, log_p, targets, references)
        return int(references[DENSE].log_p.nbytes)

    def _add(
        self,
        name: str,
        log_p: scoring.Predictions,
        targets: np.ndarray,
        references: dict[str, scoring.Reference],
    ) -> None:
        self.scores.setdefault(name, scoring.Scores()).add(log_p, targets, references)
        if name in (SOURCE, DENSE):
            references[name] = scoring.Reference(log_p)

    def _variant(self, name: str, harness: probes.Harness) -> Variant:
        scores = self.scores[name]
        ppl, se, surprise = scores.perplexity()
        against = {reference: scores.against(reference) for reference in scores.divergence}
        if name not in self.maskings:
            return Variant(name, None, 0.0, ppl, se, surprise, against)
        layers = self.maskings[name].realised()
        realised = probes.weighted(layers, harness.layers)
        return Variant(name, self.choices[name].sparsity, realised, ppl, se, surprise, against, layers)
