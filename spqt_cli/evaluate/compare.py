"""`spqt compare`: one prompt at several sparsities, with text, speed, bytes read and quality of each.

Quality is the perplexity that the dense model gives to each text after the same prompt, and KL on a text: to
the dense run, or to the source where that is named; then MLX's own row-grouped rounding of it answers too.
Speeds are of equal lengths, by turns (`turns`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten

from spqt_cli.convert import parameters, source_model
from spqt_cli.decode import context, generate, profile, session
from spqt_cli.decode.only_mlx import check_unpatched, only_mlx
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.errors import UsageError
from spqt_cli.evaluate import several, turns, variants
from spqt_cli.evaluate.perplexity import evaluate, windows
from spqt_cli.evaluate.report import DENSE, ROWS, SOURCE, Variant
from spqt_cli.evaluate.variants import OnProgress
from spqt_cli.format import locate, thresholds
from spqt_cli.format.folder import Folder
from spqt_cli.measure import texts

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Reference:
    """What a model is held against. source: unquantized: a folder, hub id or .gguf file; None: its dense run.

    text: a file, None for the shipped one; windows: of it.
    """

    source: str | None = None
    text: Path | None = None
    windows: int = 4


@dataclass(frozen=True)
class Divergence:
    """KL(reference || row), nats per token, and its standard error over windows of a text.

    reference: "source", or "dense" where no source was named.
    """

    mean: float
    se: float
    text: str
    windows: int
    reference: str = SOURCE


@dataclass
class Row:
    """One run. sparsity_target: 0 means dense. perplexity: of `text`, by the dense model.

    stock: MLX's row-grouped model ran, not ours. speeds: by turns, `timed_tokens` each, ratios to dense where
    that is among the rows, else to the first. kl_to_dense: nats per token on the text; None of dense and
    stock rows.
    """

    sparsity_target: float
    text: str
    statistics: generate.Statistics
    perplexity: float
    divergence: Divergence | None = None
    stock: bool = False
    speeds: turns.Speeds = field(default_factory=lambda: turns.Speeds([], []))
    timed_tokens: int = 0
    kl_to_dense: float | None = None

    @property
    def name(self) -> str:
        """In titles and tables."""
        if self.stock:
            return "stock"
        return f"{self.sparsity_target:.0%}" if self.sparsity_target else DENSE


@dataclass(frozen=True)
class Effort:
    """How much is run. max_tokens: of each text. rounds: of timing, by turns, after one that warms up."""

    max_tokens: int = 96
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < LEAST_ROUNDS:
            raise UsageError(f"--rounds {self.rounds}: a range needs {LEAST_ROUNDS}", "leave --rounds out")


def compare(
    path: str,
    prompt: Prompt,
    sparsities: Sequence[float],
    effort: Effort = Effort(),
    on_progress: OnProgress = lambda *_: None,
    reference: Reference = Reference(),
) -> list[Row]:
    """A row for each sparsity (0 to 0.95; 0 runs dense), greedy and so repeatable.

    on_progress: called with (done, total, what) before each unit of work; every loop counts its own.
    reference: what KL is measured on, and against; with a source a stock row comes first. Raises UsageError
    for values out of range and SpqtError where a sparsity needs thresholds and there are none, or for a
    source or text that won't do, all before a weight is read.
    """
    for sparsity in sparsities:
        thresholds.check_sparsity(sparsity)
    folder = locate.open_folder(path)
    folder.thresholds(max(sparsities))
    _check(folder, reference)
    ours, ways, rows, answers = _Ours(folder), [], [], []
    targets = list(dict.fromkeys(sparsities))
    total = len(targets) + (reference.source is not None)
    if reference.source is not None:
        on_progress(0, total, "answering: stock")
        network, row, answer = _stock(folder, reference.source, prompt, effort.max_tokens)
        ways.append(turns.Way(row.name, lambda: network, stock=True))
        rows.append(row)
        answers.append(answer)
    for target in targets:
        on_progress(len(rows), total, f"answering: {f'sparsity {target:.0%}' if target else 'dense'}")
        answers.append([])
        options = Options(max_tokens=effort.max_tokens, on_token=answers[-1].append)
        loaded = ours.at(target)
        tokens = generate.encode(loaded, prompt)
        *pieces, statistics = generate.stream(loaded, tokens, Sampling(), options)
        rows.append(Row(target, "".join(pieces), statistics, math.nan))
        ways.append(turns.Way(rows[-1].name, functools.partial(ours.model, target)))
    on_the_clock = turns.room(folder.config, len(tokens), effort.max_tokens)
    _time(rows, ways, turns.Clock(tokens, on_the_clock, effort.rounds), on_progress)
    judge = ours.at(0.0)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        on_progress(number, total, "perplexity of the answers")
        row.perplexity = perplexity(judge, generate.encode(judge, prompt), answer)
    del judge, loaded, ours, ways
    _hold_against(rows, folder, reference, on_progress)
    return rows


class _Ours:
    """The converted model, at one sparsity at a time."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._repacks = bool(profile.read()[0])
        self._loaded: session.Loaded | None = None

    def at(self, target: float) -> session.Loaded:
        """The model as it runs at a sparsity; 0: dense.

        Loaded anew where there is a profile: it repacks layers for one sparsity, and there is no way back.
        """
        if self._loaded is None or self._repacks:
            self._loaded = None  # both would be in memory
            self._loaded = session.load(self._folder, sparsity=target, dense=not target)
        elif target:
            session.set_sparsity(self._loaded, target)
        else:
            session.set_dense(self._loaded)
        return self._loaded

    def model(self, target: float) -> Any:
        return self.at(target).model


def expectation(path: str, sparsities: Sequence[float]) -> str:
    """What can be hoped for, a line, from sizes alone: bytes bound decoding, and small models bear less."""
    folder = locate.open_folder(path)
    lazily = session.load_lazily(folder)
    other, zigzag = session.weight_bytes(lazily.model, lazily.config)
    skippable = sum(zigzag.values())
    dense = other + skippable
    arrays = dict(tree_flatten(parameters.build(folder.config, str(folder)).parameters())).values()
    count = sum(array.size for array in arrays)
    bounds = [f"{s:.0%}: {dense / (dense - s * skippable):.2f}" for s in sparsities if s]
    at_most = f"; at most so many times dense's speed, by bytes: {', '.join(bounds)}" if bounds else ""
    return (
        f"{count / 1e9:.2g}B weights, {dense / 1e6:.0f} MB a token dense{at_most}; models of this size are "
        f"calibrated for {thresholds.default_sparsity(count):.0%} unless told otherwise"
    )


def _time(rows: list[Row], ways: Sequence[turns.Way], clock: turns.Clock, on_progress: OnProgress) -> None:
    """Put into each row its speeds by turns."""
    base = DENSE if any(way.name == DENSE for way in ways) else ways[0].name
    found = turns.take(ways, base, clock, on_progress)
    for row in rows:
        row.speeds, row.timed_tokens = found[row.name], clock.tokens


def _check(folder: Folder, reference: Reference) -> None:
    """Refuse a source, a text or a number of windows that can't work; no weight is read."""
    variants.check(variants.EvaluateOptions(windows=reference.windows))
    lazily = session.load_lazily(folder)
    if reference.source is not None:
        variants.check_source(reference.source, lazily)
    size, _ = context.window(context.tokens(lazily.config), None, variants.WINDOW)
    windows(lazily, texts.read(reference.text), reference.windows, size)


def _stock(folder: Folder, source: str, prompt: Prompt, max_tokens: int) -> tuple[nn.Module, Row, list[int]]:
    """mlx-lm's own rounding of the source, bits and groups as in the folder; its answer, in tokens too."""
    from mlx_lm.generate import stream_generate

    ours = session.load_lazily(folder)
    tokens = generate.encode(ours, prompt)
    network = source_model.load(source, source_model.settings_of(ours.model))
    with only_mlx():
        check_unpatched(network)
        answers: list[Any] = list(stream_generate(network, ours.tokenizer, tokens, max_tokens=max_tokens))
    size, _ = several.step_bytes(network, ours.config)
    last = answers[-1]
    statistics = generate.Statistics(
        prompt_tokens=last.prompt_tokens,
        prompt_tps=last.prompt_tps,
        generation_tokens=last.generation_tokens,
        generation_tps=last.generation_tps,
        peak_memory_bytes=last.peak_memory * 1e9,
        backend="stock",
        backend_reason="MLX's own kernels, row-grouped",
        sparsity=0.0,
        weight_bytes_per_token=size,
        dense_weight_bytes_per_token=size,
        finish_reason=last.finish_reason,
    )
    text = "".join(answer.text for answer in answers)
    return network, Row(0.0, text, statistics, math.nan, stock=True), [answer.token for answer in answers]


def _hold_against(rows: Sequence[Row], folder: Folder, reference: Reference, on_progress: OnProgress) -> None:
    """Put each row's divergences in their place: from the source if there is one, and from dense."""
    asked = ",".join(str(row.sparsity_target) for row in rows if row.sparsity_target)
    if reference.source is None:
        if not asked:
            return
        options = variants.EvaluateOptions(sparsity=asked, windows=reference.windows)
        quality = evaluate(folder, reference.text, options, on_progress)
        named: Sequence[Variant] = quality.variants
        text, count = quality.text, quality.windows
    else:
        options = variants.EvaluateOptions(
            sparsity=asked or "0", baseline=reference.source, rows=True, windows=reference.windows
        )
        wishes = several.Wishes([str(folder)], [reference.text], options, (reference.windows,))
        (found,) = several.evaluate(wishes, on_progress).texts
        named, text, count = found.variants, found.text, found.windows
    to = DENSE if reference.source is None else SOURCE
    by_name = {one.name: one.against for one in named}
    for row in rows:
        against = by_name[ROWS if row.stock else row.name]
        if to in against:
            row.divergence = Divergence(against[to].kl, against[to].se, text, count, to)
        if row.sparsity_target and DENSE in against:
            row.kl_to_dense = against[DENSE].kl


def perplexity(loaded: session.Loaded, prompt_tokens: list[int], answer: list[int]) -> float:
    """exp of the mean negative log-likelihood per token of an answer after its prompt, by `loaded` as set.

    answer: the tokens as they were written; NaN where there are none.
    """
    import mlx.core as mx

    if not answer:
        return math.nan
    ids = mx.array([prompt_tokens + answer])
    logits = loaded.model(ids[:, :-1])[0, len(prompt_tokens) - 1 :]
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(answer))
    return float(mx.exp(losses.mean()))
