"""`spqt eval` with several models, texts or peers: one model in memory at a time.

The source runs first. Its log-probabilities at the scored positions wait in a temporary file (16-bit) while
the others run one after another. Windows, prompts and masks are those of perplexity.py.
"""

import gc
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.convert import source_model
from spqt_cli.decode import bytes_read, context, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import ResourceError, SpqtError, UsageError
from spqt_cli.evaluate import several_report, variants
from spqt_cli.evaluate.perplexity import LOGITS_BYTES, MOST_WINDOWS, windows
from spqt_cli.evaluate.report import DENSE, ROWS, SOURCE
from spqt_cli.evaluate.several_report import Compared, Several, TextResult
from spqt_cli.evaluate.variants import Choice, EvaluateOptions, OnProgress
from spqt_cli.format import locate
from spqt_cli.measure import many_rows, probes, scoring, texts


@dataclass(frozen=True)
class Wishes:
    """models, peers: folders or hub ids, as they are or LABEL=FOLDER. texts: None is the shipped one.

    counts: windows of each text, or one number for all. against: the variant that others are held against;
    None: the row-grouped one if it is measured, else the first dense one. options: as for one model.
    """

    models: Sequence[str]
    texts: Sequence[Path | None]
    options: EvaluateOptions
    counts: Sequence[int] = (8,)
    peers: Sequence[str] = ()
    against: str | None = None


@dataclass(frozen=True)
class Passage:
    """A text cut into windows: rows (windows, window) tokens."""

    name: str
    sha256: str
    rows: np.ndarray

    @property
    def scored(self) -> int:
        """Positions of a window whose predictions are scored."""
        return int(self.rows.shape[1] - self.rows.shape[1] // 2 - 1)


def evaluate(wishes: Wishes, on_progress: OnProgress) -> Several:
    """Score all models and peers on all texts. What can't work is refused before a weight is read.

    Raises SpqtError for texts, folders and tokenizers that don't fit, UsageError for bad options.
    """
    options = wishes.options
    models, peers = labelled(wishes.models), labelled(wishes.peers)
    check(wishes, [*models, *peers])
    choices, first, limit = _opened(models, options)
    for name in peers.values():
        variants.check_source(name, first)
    if options.baseline is not None:
        sizes = ("vocab_size", "hidden_size") if options.source_head else ("vocab_size",)
        variants.check_source(options.baseline, first, sizes)
    window, note = context.window(limit, options.window, variants.WINDOW)
    passages = [
        _passage(first, path, count, window)
        for path, count in zip(wishes.texts, _counts(wishes), strict=True)
    ]
    names = _names(options, choices, peers)
    if wishes.against is not None:
        several_report.check_against(wishes.against, names)
    run = _Run(passages, options, len(names), on_progress)
    with run.keeping():
        run.stock(options.baseline, source_model.settings_of(first.model))
        del first
        for label, name in peers.items():
            run.peer(label, name)
        for label, name in models.items():
            run.model(label, name, choices[label], alone=len(models) == 1)
    results = run.results(names)
    against = several_report.hold_against(results, wishes.against)
    notes = [note] if note else []
    if options.source_head:
        notes.append("embedding and head are the source's in all; MB/token counts each model's own")
    return Several({**models, **peers}, against, results, notes)


def labelled(names: Sequence[str]) -> dict[str, str]:
    """Label -> folder or hub id, of "LABEL=FOLDER" or of a name alone, whose last part is its label."""
    found: dict[str, str] = {}
    for name in names:
        label, equals, path = name.partition("=")
        if not equals or "/" in label or Path(name).exists():
            label, path = Path(name).name or name, name
        if not label or not path:
            raise UsageError(f"{name!r} names no model", "FOLDER or LABEL=FOLDER")
        if label in found:
            raise UsageError(f"two models are called {label!r}", f"tell them apart: ONE={found[label]}")
        found[label] = path
    return found


def check(wishes: Wishes, labels: Sequence[str]) -> None:
    """Raise UsageError for wishes that contradict one another."""
    for count in wishes.counts:
        variants.check(replace(wishes.options, windows=count))
    if len(wishes.counts) not in (1, len(wishes.texts)):
        raise UsageError(
            f"{len(wishes.counts)} numbers of windows for {len(wishes.texts)} texts",
            "give one for all or one for each: --windows 32,24",
        )
    taken = {SOURCE, ROWS, DENSE} & set(labels) or {one for one in labels if labels.count(one) > 1}
    if taken:
        raise UsageError(f"{taken.pop()!r} is another variant's name", "name the model: LABEL=FOLDER")


def _counts(wishes: Wishes) -> Sequence[int]:
    return wishes.counts if len(wishes.counts) > 1 else [wishes.counts[0]] * len(wishes.texts)


def _opened(
    models: Mapping[str, str], options: EvaluateOptions
) -> tuple[dict[str, dict[str, Choice]], session.Loaded, int | None]:
    """The thresholds of every model, the first one with its weights on disk, and the shortest context.

    Raises SpqtError for a model whose tokens are not the first one's.
    """
    choices: dict[str, dict[str, Choice]] = {}
    first: session.Loaded | None = None
    limits = []
    for label, name in models.items():
        one = session.load_lazily(locate.open_folder(name))
        choices[label] = variants.stored(one, options.sparsity)
        limits.append(context.tokens(one.config))
        first = first or one
        if one.folder.size("vocab_size") != first.folder.size("vocab_size"):
            raise SpqtError(f"{name} and {first.folder} have vocabularies of two sizes", "evaluate it alone")
        variants.check_tokens(name, one.tokenizer.get_vocab(), first, "evaluate it alone")
    if first is None:
        raise UsageError("no model is given", "--model MODEL")
    return choices, first, min((limit for limit in limits if limit is not None), default=None)


def _passage(loaded: session.Loaded, path: Path | None, count: int, window: int) -> Passage:
    document = texts.read(path)
    return Passage(Path(document.name).name, document.sha256, windows(loaded, document, count, window))


def _names(
    options: EvaluateOptions, choices: Mapping[str, Mapping[str, Choice]], peers: Mapping[str, str]
) -> list[str]:
    """The names of all variants, in the order of the tables."""
    stock = [SOURCE] if options.baseline else []
    stock += [ROWS] if options.rows else []
    own = [_name(label, share, len(choices) == 1) for label in choices for share in (DENSE, *choices[label])]
    return [*stock, *peers, *own]


def _config(name: str) -> dict[str, Any]:
    return source_model.open_source(name, headers_only=True).config


def _name(label: str, share: str, alone: bool) -> str:
    return share if alone else f"{label} {share}"


def step_bytes(network: nn.Module, config: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Bytes of weights that a dense step reads: of all, and of each Zigzag layer by path.

    Numbers that are not packed count as 16-bit ones, whatever they are computed in.
    """
    modules = dict(network.named_modules())
    fractions = bytes_read.Fractions(modules, config)
    sizes = {path: _stored_bytes(one) * fractions.of(path) for path, one in modules.items()}
    zigzag = {path: sizes[path] for path in zigzag_layers(network)}
    return sum(sizes.values()), zigzag


def _stored_bytes(module: nn.Module) -> int:
    arrays = [value for value in module.values() if isinstance(value, mx.array)]
    return sum(2 * one.size if mx.issubdtype(one.dtype, mx.floating) else one.nbytes for one in arrays)


class _Run:
    """The passages of one evaluation, the source's predictions and what was measured so far."""

    def __init__(
        self, passages: Sequence[Passage], options: EvaluateOptions, count: int, on_progress: OnProgress
    ) -> None:
        self.passages, self.options, self.on_progress = passages, options, on_progress
        self.total = count * sum(len(one.rows) for one in passages)
        self.done = 0
        self.found: list[dict[str, Compared]] = [{} for _ in passages]
        self.heads: dict[str, nn.Module] = {}
        self.kept: Kept | None = None
        self._folder = Path()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the block the source's predictions lie in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="spqt-eval-") as folder:
            self._folder = Path(folder)
            try:
                yield
            finally:
                if self.kept is not None:
                    self.kept.close()

    def stock(self, baseline: str | None, settings: source_model.Settings) -> None:
        """Score the source and its row-grouped form, if asked for; settings: bits and groups of that."""
        if baseline is None:
            return
        self.on_progress(0, 1, "loading the source")
        network = source_model.load(baseline)
        if self.options.source_head:
            self.heads = variants.heads(network)
        self.kept = Kept(self._folder, [(len(one.rows), one.scored) for one in self.passages])
        self._score(network, SOURCE, _config(baseline))
        del network
        if self.options.rows:
            freed()
            network = source_model.load(baseline, settings)
            self._score(network, ROWS, _config(baseline))

    def peer(self, label: str, name: str) -> None:
        """Score a model of mlx-lm's own, dense."""
        freed()
        self._score(variants.load_peer(name), label, _config(name))

    def model(self, label: str, name: str, choices: Mapping[str, Choice], alone: bool) -> None:
        """Score a converted model dense and at each of its sparsities."""
        freed()
        loaded = session.load(name, dense=True)
        self._score(loaded.model, label, loaded.config, choices, alone)

    def _score(
        self,
        network: nn.Module,
        label: str,
        config: dict[str, Any],
        choices: Mapping[str, Choice] | None = None,
        alone: bool = False,
    ) -> None:
        total, zigzag = step_bytes(network, config)
        if self.heads and label != SOURCE:
            variants.take_heads(network, self.heads)
        with probes.probing(network) as harness, many_rows.holding(many_rows.spare_bytes()):
            for at, passage in enumerate(self.passages):
                scored = _Scored(network, harness, choices or {})
                for rows, targets, reference in self._batches(at, passage, scored, label):
                    scored.add(rows, targets, reference)
                    self.done += len(rows) * (1 + len(scored.maskings))
                for name in scored.scores:
                    own = label if choices is None else _name(label, name, alone)
                    one = scored.variant(name, own, label)
                    unread = sum(size * one.layers.get(path, 0.0) for path, size in zigzag.items())
                    one.bytes_per_token = total - unread
                    self.found[at][own] = one

    def _batches(
        self, at: int, passage: Passage, scored: "_Scored", label: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray, scoring.Predictions | None]]:
        """(windows, targets, the source's log-probabilities) batch by batch; keeps those of the source."""
        place, batch = 0, 1
        while place < len(passage.rows):
            self.on_progress(self.done, self.total, f"{label} on {passage.name}")
            rows = passage.rows[place : place + batch]
            held = self.kept is not None and label != SOURCE
            reference = self.kept.read(at, place, len(rows)) if self.kept and held else None
            yield rows, rows[:, -passage.scored :], reference
            if self.kept and not held:
                self.kept.write(at, place, np.array(scored.last, copy=False))
            place += batch
            batch = max(1, min(MOST_WINDOWS, LOGITS_BYTES // (scored.last.nbytes // len(rows))))
        scored.last = np.empty(0)

    def results(self, names: Sequence[str]) -> list[TextResult]:
        """What was found, in the order of `names`."""
        return [
            TextResult(
                passage.name,
                passage.sha256,
                len(passage.rows),
                passage.rows.shape[1],
                len(passage.rows) * passage.scored,
                [found[name] for name in names],
            )
            for passage, found in zip(self.passages, self.found, strict=True)
        ]


class _Scored:
    """One model on one text: dense and by each choice of thresholds."""

    def __init__(self, network: nn.Module, harness: probes.Harness, choices: Mapping[str, Choice]) -> None:
        self.network, self.harness, self.choices = network, harness, choices
        self.maskings = {name: probes.Masking(choice.thresholds) for name, choice in choices.items()}
        self.scores = {name: scoring.Scores() for name in (DENSE, *self.maskings)}
        self.last: scoring.Predictions = np.empty(0)

    def add(self, rows: np.ndarray, targets: np.ndarray, source: scoring.Predictions | None) -> None:
        """rows (B, window), targets (B, T); source: log-probabilities (B, T, vocab). Sets `last`, the dense
        run's log-probabilities.
        """
        references = {} if source is None else {SOURCE: scoring.Reference(source)}
        prompt, rest = mx.split(mx.array(rows), [rows.shape[1] // 2], axis=1)
        cache = probes.prompt_cache(self.network, prompt)
        logits = probes.continuation(self.network, rest[:, :-1], cache)
        self.last = scoring.log_probabilities(logits)
        del logits
        self.scores[DENSE].add(self.last, targets, references)
        if self.maskings:
            references[DENSE] = scoring.Reference(self.last)
        for name, masking in self.maskings.items():
            with self.harness.masked(masking):
                log_p = scoring.log_probabilities(probes.continuation(self.network, rest[:, :-1], cache))
                masking.evaluate()
            self.scores[name].add(log_p, targets, references)

    def variant(self, name: str, own: str, label: str) -> Compared:
        """What `name` (dense or a choice) came to, under its own name."""
        scores = self.scores[name]
        ppl, se, surprise = scores.perplexity()
        against = {reference: scores.against(reference) for reference in scores.divergence}
        found = Compared(own, None, 0.0, ppl, se, surprise, against, model=label)
        if name in self.maskings:
            found.layers = self.maskings[name].realised()
            found.realised = probes.weighted(found.layers, self.harness.layers)
            found.sparsity = self.choices[name].sparsity
        return found


class Kept:
    """Log-probabilities of every scored position of every passage, in files of 16-bit numbers.

    Rounding moves a mean KL by less than 0.0001 nats: it is unbiased, and what is read is normalized.
    """

    def __init__(self, folder: Path, shapes: Sequence[tuple[int, int]]) -> None:
        """shapes: (windows, scored positions) of each passage."""
        self._shapes = shapes
        self._vocab = 0
        self._folder = folder
        places = [folder / str(at) for at in range(len(shapes))]
        self._files = [place.open("w+b", buffering=0) for place in places]
        for place in places:  # a file without a name is gone with its process, however that ends
            place.unlink()

    def write(self, passage: int, place: int, log_p: np.ndarray) -> None:
        """log_p (B, T, vocab) of windows from `place` on. Raises ResourceError for too small a disk."""
        if not self._vocab:
            self._vocab = log_p.shape[-1]
            self._check_space()
        file = self._files[passage]
        file.seek(self._start(passage, place))
        file.write(log_p.astype(np.float16).data)

    def read(self, passage: int, place: int, count: int) -> scoring.Predictions:
        """(count, T, vocab) float32, as `write` got them but for rounding."""
        scored = self._shapes[passage][1]
        file = self._files[passage]
        file.seek(self._start(passage, place))
        data = np.fromfile(file, np.float16, count * scored * self._vocab)
        return scoring.log_probabilities(mx.array(data.reshape(count, scored, self._vocab)))

    def _check_space(self) -> None:
        needed = sum(count * scored for count, scored in self._shapes) * self._vocab * 2
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise ResourceError(
                f"{self._folder.parent} has {free / 1e9:.1f} GB free, the source's predictions take "
                f"{needed / 1e9:.1f} GB",
                "set TMPDIR to a folder with more room, or score fewer windows",
            )

    def _start(self, passage: int, place: int) -> int:
        return place * self._shapes[passage][1] * self._vocab * 2

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def freed() -> None:
    """Give back what the last model held."""
    gc.collect()
    mx.clear_cache()
