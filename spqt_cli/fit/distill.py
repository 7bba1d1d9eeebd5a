"""Training of a compressed model towards its source's predictions, with channels skipped at decode positions.

Which layer skips how much is allocated first. Codes stay. Every group's scale and bias and the norms' weights
are trained by Adam on the KL divergence from the source, block by block: forwards, what enters each block is
kept; backwards, a block is run again and differentiated, and its step is taken at once. Some windows are held
out: if the model is no nearer to the source on them at the end, it stays as it was.

Source: distillation of scales and biases as in mlx-lm's DWQ; masks and norms are our addition.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate.stream.blocks import Walk
from spqt_cli.convert.encode import is_finite
from spqt_cli.convert.journal import Journal
from spqt_cli.decode.session import Loaded
from spqt_cli.errors import SpqtError
from spqt_cli.fit import masks, predictions, shares, targets
from spqt_cli.fit.affine import NORM_RATE, Trained
from spqt_cli.fit.matrices import FACTOR
from spqt_cli.fit.source_blocks import SourceBlocks
from spqt_cli.fit.store import Store
from spqt_cli.fit.student import Student
from spqt_cli.fit.weights_file import WeightsFile
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import many_rows
from spqt_cli.system import heap

HELD_OUT = 8  # one window of so many is not trained on
PRICED = 6  # windows at most, for the shares of layers
SETTLED_EVERY = 60  # steps
SETTLING = 8  # windows for thresholds
HEADS_BYTES = {"cpu": 256 << 20, "gpu": 16 << 30}  # of heads held unpacked

OnProgress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Options:
    """rate: the learning rate of factors and offsets. sparsities: one is drawn for each step. scored: the
    part of a text's positions whose predictions a step compares.

    save_every: steps between two states that a killed run goes on from.
    """

    steps: int
    batch: int = 2
    rate: float = 1e-3
    sparsities: tuple[float, ...] = (masks.SPARSITY,)
    scored: float = 1.0
    seed: int = 0
    save_every: int = 20


@dataclass(frozen=True)
class DistillationResult:
    """The loss (nats) on held-out windows before and after. kept: whether the trained weights are used."""

    first: float
    last: float
    steps: int
    kept: bool

    def line(self) -> str:
        """For people."""
        what = "on texts held out the divergence from the source, half of it skipped at decode steps,"
        if self.kept:
            return f"{what} fell from {self.first:.4f} to {self.last:.4f} in {self.steps} steps of training"
        return f"{what} did not fall below {self.first:.4f}: scales and norms stay as they were"


class Distillation:
    """The training; `run` it once."""

    def __init__(
        self,
        fitted: Loaded,
        source: SourceBlocks,
        windows: np.ndarray,
        store: Store,
        on_progress: OnProgress,
        options: Options,
    ) -> None:
        """fitted: loaded lazily. windows: (texts, window) tokens, window even, at least two texts; those
        that weights were rounded on first, in that order. source: its blocks are only read for windows
        whose states are not in the store, and then nobody may have read them before.
        Raises UnsupportedError for a model whose blocks can't be walked (here or in `run`), SpqtError for
        a single text.
        """
        if len(windows) < 2:
            raise SpqtError("one text is too few to train on: some are held out", "give more text")
        self._source, self._windows, self._store = source, windows, store
        self._on_progress, self._options = on_progress, options
        self._student = Student(fitted, windows.shape[1])
        self._walk = cast(Walk, source.walk)  # a source without has a student that was refused
        self._stored = _dtypes(fitted)
        count = len(windows)
        self._training = count - max(1, count // HELD_OUT)
        self._parts = [Trained(self._student.start(n)) for n in range(len(self._student.blocks))]
        self._parts.append(Trained(self._student.start_of_last_norms()))
        self._shares: dict[float, dict[str, float]] = {}  # of each layer at a total sparsity
        self._thresholds: dict[float, dict[str, float]] = {}
        self._first = math.nan

    def run(self, output: WeightsFile, journal: Journal) -> DistillationResult:
        """Train and write what comes of it into `output`. What an earlier run did is not done again."""
        if (done := finish_writing(output, journal, self._store)) is not None:
            return done
        heads = HEADS_BYTES["cpu" if many_rows.on_cpu() else "gpu"]
        with many_rows.holding(heads), self._student.side_by_side(self._options.batch):
            return self._run(output, journal)

    def _run(self, output: WeightsFile, journal: Journal) -> DistillationResult:
        heap.trim()
        self._shares = self._known_shares(journal)  # a model that can't be trained is refused here
        self._find_targets()
        start = self._resumed(journal)
        if not start:
            self._first = self._held_out_loss()
        heap.trim()
        steps = self._options.steps
        for step in range(start, steps):
            if step > start and step % self._options.save_every == 0:
                self._save(step, journal)
            self._on_progress(step, steps, "training scales and norms")
            self._step(step)
        final = self._final()
        last = self._held_out_loss()
        result = DistillationResult(self._first, last, steps, kept=last < self._first)
        if not result.kept:
            final = {}
        for name, array in final.items():
            self._store.save(f"final-{name}", array)
        noted = {
            "result": asdict(result),
            "dtypes": {name: str(array.dtype).rpartition(".")[2] for name, array in final.items()},
            "hashes": {f"final-{name}": self._store.sha256(f"final-{name}") for name in final},
        }
        journal.note("distilled", noted)
        self._store.drop("distilling-*")
        finish_writing(output, journal, self._store)
        return result

    def _find_targets(self) -> None:
        if targets.missing(self._store, self._windows):
            targets.take_over(self._store, len(self._student.blocks))
        if which := targets.missing(self._store, self._windows):
            self._on_progress(0, self._options.steps, "passing texts through the source")
            targets.make(self._source, self._windows, which, self._store)

    # shares

    def _known_shares(self, journal: Journal) -> dict[float, dict[str, float]]:
        """The shares, found once: in the journal from then on."""
        if "shares" not in journal.done:
            totals = sorted({masks.SPARSITY, *self._options.sparsities})
            windows = self._windows[: min(PRICED, self._training)]
            seed = self._options.seed
            curves = shares.of_layers(self._student, windows, self._adopt, seed, self._on_progress)
            found = {
                str(total): {path: float(np.interp(total, CURVE_SPARSITIES, c)) for path, c in curves.items()}
                for total in totals
            }
            journal.note("shares", found)
        return {float(total): found for total, found in journal.done["shares"].items()}

    # training

    def _step(self, step: int) -> None:
        """One step of Adam on a batch of windows."""
        if step % SETTLED_EVERY == 0:
            self._thresholds = {share: self._settled(share) for share in self._options.sparsities}
        self._student.thresholds = self._thresholds[self._drawn(step)]
        rate = self._rate(step)
        draw = np.random.default_rng([self._options.seed, 2, step])
        for number, slopes in self.slopes(self._batch(step), draw):
            trained = self._parts[number]
            rates = {name: NORM_RATE * rate if name in self._stored else rate for name in slopes}
            trained.step(slopes, rates, step + 1)

    def slopes(
        self, which: list[int], draw: np.random.Generator
    ) -> Iterator[tuple[int, dict[str, mx.array]]]:
        """The slopes of the mean loss on some windows by each part's values, the last part's first.

        draw: chooses the positions that are scored. Part -1 are the norms behind the blocks. A part's values
        may change once its slopes are there.
        """
        blocks = range(len(self._student.blocks))
        states = [self._student.embedded(self._windows[which])]
        for number in blocks:
            self._adopt(number)
            states.append(self._student.forward(number, states[-1], keep=True))
        slope, by_norms = self._at_head(which, states.pop(), draw)
        yield -1, by_norms
        for number in reversed(blocks):
            self._adopt(number)
            slope, slopes = self._student.backward(number, states.pop(), slope)
            yield number, slopes

    def _at_head(
        self, which: list[int], hidden: mx.array, draw: np.random.Generator
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The slopes of the batch's mean loss by hidden (texts, window, width) and by the last norms."""
        self._adopt(-1)
        names = list(self._student.last_norms)
        others = [self._student.values[name] for name in names]
        by_hidden, by_others = [], [mx.zeros_like(a) for a in others]
        prompt, part = self._student.prompt, self._options.scored
        weight = predictions.weights(hidden.shape[1], prompt)
        for i, w in enumerate(which):
            some = weight if part == 1 else predictions.drawn(weight, prompt, part, draw)
            _, one, rest = predictions.slopes(*self._heads(w), hidden[i : i + 1], others, some)
            by_hidden.append(one / len(which))
            by_others = [a + b / len(which) for a, b in zip(by_others, rest, strict=True)]
        mx.eval(by_hidden, by_others)
        return mx.concatenate(by_hidden), dict(zip(names, by_others, strict=True))

    def _heads(self, w: int) -> tuple[Any, Any, mx.array]:
        """The model's head, its source's, and the source's states, for a window."""
        tokens = self._windows[w : w + 1]

        def source(h: mx.array, rows: slice | np.ndarray) -> mx.array:
            return self._walk.logits(tokens[:, rows], h)

        return self._student.head(tokens), source, self._store.load(targets.name(w))

    def _adopt(self, number: int) -> None:
        """Let the student have a part's values."""
        self._student.values = self._parts[number].values
        self._student.settle_last_norms()

    def _rate(self, step: int) -> float:
        """Warm-up, then a cosine down to a fiftieth."""
        steps = self._options.steps
        warm = min(20, max(1, steps // 5))
        slope = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
        return self._options.rate * slope

    def _drawn(self, step: int) -> float:
        choices = self._options.sparsities
        return choices[int(np.random.default_rng([self._options.seed, 1, step]).integers(len(choices)))]

    def _batch(self, step: int) -> list[int]:
        """The windows of a step: all of them in some order, then in another."""
        size, count = self._options.batch, self._training
        places = range(step * size, (step + 1) * size)
        orders = {
            turn: np.random.default_rng([self._options.seed, 0, turn]).permutation(count)
            for turn in {place // count for place in places}
        }
        return [int(orders[place // count][place % count]) for place in places]

    def _settled(self, share: float) -> dict[str, float]:
        """Thresholds at which the model as it is skips a share, blocks before being masked as well."""
        self._student.thresholds = {}
        h = self._student.embedded(self._windows[: min(SETTLING, self._training)])
        for number in range(len(self._student.blocks)):
            self._adopt(number)
            h = self._student.forward(number, h, shares=self._shares[share])
        heap.trim()  # so many texts at once leave much
        return self._student.thresholds

    def _held_out_loss(self) -> float:
        """The mean loss on windows that are not trained on, with masks for the usual share."""
        self._student.thresholds = self._settled(masks.SPARSITY)
        losses, held_out = [], range(self._training, len(self._windows))
        for i, w in enumerate(held_out):
            self._on_progress(i, len(held_out), "scoring on held-out text")
            h = self._student.embedded(self._windows[w : w + 1])
            for number in range(len(self._student.blocks)):
                self._adopt(number)
                h = self._student.forward(number, h)
            self._adopt(-1)
            losses.append(predictions.loss(*self._heads(w), h, self._student.prompt))
        return float(np.mean(losses))

    # the end

    def _final(self) -> dict[str, mx.array]:
        """Name -> what will be stored: scales, biases and norms in their dtypes; the student has the same."""
        found: dict[str, mx.array] = {}
        self._student.matrices.rounded_to = self._stored
        for number, part in enumerate(self._parts):
            self._adopt(number)
            for name, value in part.values.items():
                if name in self._stored:  # a norm's weight
                    found[name] = value.astype(self._stored[name])
                elif name.endswith(FACTOR):
                    path = name.removesuffix(f".{FACTOR}")
                    for kind, array in zip(
                        ("scales", "biases"), self._student.matrices.affine(path), strict=True
                    ):
                        found[f"{path}.{kind}"] = array.astype(self._stored[f"{path}.{kind}"])
            part.values |= {name: a.astype(mx.float32) for name, a in found.items() if name in part.values}
        for name, array in found.items():
            mx.eval(array)
            if not is_finite(array):
                said = str(array.dtype).removeprefix("mlx.core.")
                raise SpqtError(f"tensor {name}: what was trained does not fit {said}", "--dtype float32")
        return found

    # resuming

    def _save(self, step: int, journal: Journal) -> None:
        """Note the state before a step."""
        names = [f"distilling-{step}-{number}" for number in range(len(self._parts))]
        for name, part in zip(names, self._parts, strict=True):
            self._store.save(name, part.flat())
        state = {
            "step": step,
            "hashes": {name: self._store.sha256(name) for name in names},
            "thresholds": {str(share): found for share, found in self._thresholds.items()},
            "first": self._first,
        }
        journal.note("distilling", state)
        self._store.drop(f"distilling-{step - self._options.save_every}-*")

    def _resumed(self, journal: Journal) -> int:
        """The step that an earlier run came to, its state taken up if it is whole; else 0."""
        noted = journal.done.get("distilling")
        if noted is None or not _are_whole(self._store, noted["hashes"]):
            return 0
        for part, name in zip(self._parts, noted["hashes"], strict=True):
            part.take(self._store.load(name))
        self._thresholds = {float(share): found for share, found in noted["thresholds"].items()}
        self._first = noted["first"]
        return int(noted["step"])


def finish_writing(output: WeightsFile, journal: Journal, store: Store) -> DistillationResult | None:
    """Write what a training that came to its end left; None where there was none.

    Raises SpqtError where that is damaged: the folder may hold a part of it.
    """
    noted = journal.done.get("distilled")
    if noted is None:
        return None
    if not _are_whole(store, noted["hashes"]):
        raise SpqtError("the state of a fit that was interrupted is damaged", "delete its work folder")
    for name, dtype in noted["dtypes"].items():
        output.write(name, store.load(f"final-{name}").astype(getattr(mx, dtype)))
    return DistillationResult(**noted["result"])


def _are_whole(store: Store, hashes: Mapping[str, str]) -> bool:
    """True where arrays are as they were saved."""
    return all(store.has(name) and store.sha256(name) == wanted for name, wanted in hashes.items())


def _dtypes(fitted: Loaded) -> Mapping[str, mx.Dtype]:
    """Name -> dtype of each stored tensor."""
    found: dict[str, mx.Dtype] = {}
    for shard in fitted.folder.shards:
        arrays = cast("dict[str, mx.array]", mx.load(str(fitted.folder.path / shard)))
        found |= {name: array.dtype for name, array in arrays.items()}
    return found
