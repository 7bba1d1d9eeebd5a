"""`spqt eval FILE.jsonl`: how often a model prefers the right ending, dense and with channels skipped.

An ending's score is the sum of the log-probabilities of its tokens after the context. The
context is a prompt and runs dense, as in generate; the ending's tokens are decode steps, computed as many
masked rows at once. Definitions as lm-eval's: acc takes the ending of the highest score, acc_norm of the
highest score per character of the ending's text.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from spqt_cli.decode import context, session, text_borders
from spqt_cli.errors import SpqtError
from spqt_cli.evaluate import questions, variants
from spqt_cli.evaluate.report import DENSE, ROWS, SOURCE, Answers, Difference, Result
from spqt_cli.evaluate.variants import Choice, EvaluateOptions, OnProgress
from spqt_cli.measure import many_rows, probes, scoring

ROWS_AT_ONCE = 512  # rows of endings in one pass


@dataclass(frozen=True)
class Encoded:
    """A question in tokens, with the lengths of its endings in characters."""

    context: list[int]
    endings: list[list[int]]
    characters: np.ndarray
    label: int


def evaluate(path: str | Path, file: Path, options: EvaluateOptions, on_progress: OnProgress) -> Result:
    """Answer the questions of a file by every variant: source, row-grouped, dense, and each sparsity.

    Raises SpqtError for a bad line or a question longer than the model's context.
    """
    variants.check(options)
    asked = questions.read(file, options.limit)
    loaded = session.load(path, dense=True)
    limit = context.tokens(loaded.config)
    encoded = [encode(question, loaded.tokenizer, limit, file) for question in asked.items]
    choices = variants.stored(loaded, options.sparsity)
    found = _Answering(loaded, options, choices, on_progress).run(encoded)
    return Result(str(loaded.folder), asked.name, asked.sha256, len(encoded), found)


def evaluate_several(
    models: Mapping[str, str], file: Path, options: EvaluateOptions, on_progress: OnProgress
) -> Result:
    """As `evaluate`, of one model or of several (label -> folder), whose variants are named "LABEL dense".

    The source and its row-grouped form are asked once, beside the first model.
    """
    if len(models) == 1:
        return evaluate(next(iter(models.values())), file, options, on_progress)
    once = options if options.source_head else replace(options, baseline=None, rows=False)
    found: list[Answers] = []
    for at, (label, path) in enumerate(models.items()):
        result = evaluate(path, file, once if at else options, on_progress)
        for row in result.variants:
            if row.name not in (SOURCE, ROWS):
                row.name = f"{label} {row.name}"
                if found and found[0].name == SOURCE:
                    row.against[SOURCE] = difference(row, found[0])
                found.append(row)
            elif not at:
                found.append(row)
    return replace(result, model=", ".join(models.values()), variants=found)


def difference(one: Answers, other: Answers) -> Difference:
    """One variant's accuracies less another's on the same questions."""
    gained, gained_norm = (
        np.array(mine, float) - np.array(theirs, float)
        for mine, theirs in ((one.correct, other.correct), (one.correct_norm, other.correct_norm))
    )
    errors = [scoring.standard_error(values) for values in (gained, gained_norm)]
    return Difference(float(gained.mean()), errors[0], float(gained_norm.mean()), errors[1])


def encode(question: questions.Question, tokenizer: Any, limit: int | None, file: Path) -> Encoded:
    """A question in tokens: context and ending are tokenized together, the context's own tokens cut off."""
    context = question.context.rstrip()  # its last space, if any, begins the ending, as words do
    space = question.context[len(context) :] + " "
    prompt = text_borders.encode(tokenizer, context)
    whole = [text_borders.encode(tokenizer, context + space + end) for end in question.endings]
    endings = [tokens[len(prompt) :] for tokens in whole]
    where = f"{file}, line {question.line}"
    if not prompt or not all(endings):
        raise SpqtError(f"{where}: a text without tokens of its own", "leave the question out")
    longest = len(prompt) + max(map(len, endings))
    if limit is not None and longest > limit:
        raise SpqtError(
            f"{where}: {longest} tokens, the model's context is {limit}", "leave the question out"
        )
    characters = np.array([len(ending) for ending in question.endings], np.float64)
    return Encoded(prompt, endings, characters, question.label)


def after_context(network: nn.Module, question: Encoded) -> list[Any]:
    """The model's cache after the question's context but for its last token, which `predictions` feeds."""
    prompt = question.context[:-1]
    return probes.prompt_cache(network, mx.array([prompt])) if prompt else probes.empty_cache(network)


def ending_scores(
    network: nn.Module,
    cache: list[Any],
    question: Encoded,
    harness: probes.Harness,
    masking: probes.Masking | None = None,
) -> np.ndarray:
    """The summed log-probability of each ending: (endings,), float64.

    cache: as `after_context` gives it, left as it was. masking: None runs the endings dense.
    """
    predicted = predictions(network, cache, question, harness, masking)
    return np.array([summed(log_p, e) for log_p, e in zip(predicted, question.endings, strict=True)])


def summed(log_p: scoring.Predictions, ending: list[int]) -> float:
    """The log-probability of an ending: log_p (tokens, vocab), as `predictions` gives it."""
    return float(-scoring.surprise(log_p, np.array(ending)).sum(dtype=np.float64))


def predictions(
    network: nn.Module,
    cache: list[Any],
    question: Encoded,
    harness: probes.Harness,
    masking: probes.Masking | None = None,
) -> Iterator[scoring.Predictions]:
    """Of each ending, the log-probabilities of all tokens at its places: (its tokens, vocab), float32."""
    batch = max(1, ROWS_AT_ONCE // max(map(len, question.endings)))
    for at in range(0, len(question.endings), batch):
        endings = question.endings[at : at + batch]
        rows = np.zeros((len(endings), max(map(len, endings))), np.int32)
        decoded = np.zeros(rows.shape, bool)
        for row, ending in enumerate(endings):
            rows[row, : len(ending)] = [question.context[-1], *ending[:-1]]
            decoded[row, 1 : len(ending)] = True
        with harness.masked(masking, decoded):
            logits = probes.continuation(network, mx.array(rows), _repeated(cache, len(endings)))
            mx.eval(logits)
        if masking is not None:
            masking.evaluate()
        for row, ending in enumerate(endings):
            yield scoring.log_probabilities(logits[row, : len(ending)])


def _repeated(cache: list[Any], count: int) -> list[Any]:
    """A cache of one sequence as the cache of `count` equal ones: (1, ...) -> (count, ...) throughout."""

    def repeat(value: Any) -> Any:
        one = isinstance(value, mx.array) and value.ndim > 1 and value.shape[0] == 1
        return mx.repeat(value, count, axis=0) if one else value

    found = copy.deepcopy(cache)
    for entry in found:
        entry.state = tree_map(repeat, entry.state)
    return found


class _Answering:
    """The variants of one evaluation and the scores they gave so far."""

    def __init__(
        self,
        loaded: session.Loaded,
        options: EvaluateOptions,
        choices: Mapping[str, Choice],
        on_progress: OnProgress,
    ) -> None:
        self.loaded, self.choices, self.on_progress = loaded, choices, on_progress
        self.others = variants.others(loaded, options, on_progress)
        self.maskings = {name: probes.Masking(choice.thresholds) for name, choice in choices.items()}
        names = (*self.others, DENSE, *self.maskings)
        self.correct: dict[str, list[bool]] = {name: [] for name in names}
        self.correct_norm: dict[str, list[bool]] = {name: [] for name in names}

    def run(self, asked: list[Encoded]) -> list[Answers]:
        with probes.probing(self.loaded.model) as harness, many_rows.holding(many_rows.spare_bytes()):
            for i, question in enumerate(asked):
                self.on_progress(i, len(asked), "answering questions")
                for name, network in self.others.items():
                    cache = after_context(network, question)
                    self._note(name, question, ending_scores(network, cache, question, harness))
                network = self.loaded.model
                cache = after_context(network, question)
                for name in (DENSE, *self.maskings):
                    masking = self.maskings.get(name)
                    self._note(name, question, ending_scores(network, cache, question, harness, masking))
            found = {name: self._answers(name, harness) for name in self.correct}
        for row in found.values():
            for other in (SOURCE, DENSE):
                if other in found and row.name not in (other, SOURCE):
                    row.against[other] = difference(row, found[other])
        return list(found.values())

    def _note(self, name: str, question: Encoded, scores: np.ndarray) -> None:
        self.correct[name].append(bool(scores.argmax() == question.label))
        self.correct_norm[name].append(bool((scores / question.characters).argmax() == question.label))

    def _answers(self, name: str, harness: probes.Harness) -> Answers:
        right, right_norm = (np.array(table[name], float) for table in (self.correct, self.correct_norm))
        realised, sparsity = 0.0, None
        if name in self.maskings:
            realised = probes.weighted(self.maskings[name].realised(), harness.layers)
            sparsity = self.choices[name].sparsity
        return Answers(
            name,
            sparsity,
            realised,
            float(right.mean()),
            scoring.standard_error(right),
            float(right_norm.mean()),
            scoring.standard_error(right_norm),
            {},
            self.correct[name],
            self.correct_norm[name],
        )
