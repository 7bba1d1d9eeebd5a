"""`spqt convert --fit` and `spqt fit`: a converted folder whose weights are fitted to its source.

It owns the order of the work: round, find the text, fit, publish. All of it happens in a work folder beside
the output, which appears complete or not at all; an interrupted run goes on where it stopped.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from spqt_cli.calibrate.options import note
from spqt_cli.convert import card, source, source_model
from spqt_cli.convert import convert as converter
from spqt_cli.convert.convert import ConvertOptions, ConvertResult
from spqt_cli.convert.journal import Journal, job_id
from spqt_cli.convert.source import Checkpoint
from spqt_cli.decode import context, session
from spqt_cli.decode.layers import linear_layers, zigzag_layers
from spqt_cli.errors import ResourceError, SpqtError, UnsupportedError
from spqt_cli.fit import cost, distill, own_text, text
from spqt_cli.fit.compress import Compression, lines
from spqt_cli.fit.hessian_gpu import ask_for_float32
from spqt_cli.fit.options import FitOptions
from spqt_cli.fit.source_blocks import SourceBlocks
from spqt_cli.fit.store import Store, room
from spqt_cli.fit.weights_file import WeightsFile, copy_folder
from spqt_cli.format.folder import Folder
from spqt_cli.measure import texts
from spqt_cli.system import files, heap
from spqt_cli.version import __version__

OnProgress = Callable[[float, float, str], None]
ROUNDED = "rounded"  # in the journal: every block is, and what is to be said of it
FITTED = "fitted"  # likewise: all that is left is to write hashes
EIGHT_BITS_FIT = 0.7  # of the free memory that a source may take to write text; beyond it, in 8 bits


@dataclass
class FitResult:
    """What was fitted. windows: of text, of which `own` the model wrote. notes: lines for people.

    conversion: what the rounding before it did, None for a folder that was converted already.
    """

    output: Path
    method: str
    windows: int
    own: int
    text_sha256: str
    layers: int
    seconds: float
    notes: list[str]
    conversion: ConvertResult | None = None

    def summary(self) -> str:
        """A few lines for people."""
        head = [] if self.conversion is None else [self.conversion.summary()]
        said = (
            f"{self.output}: {self.layers} layers fitted ({self.method}) on {self.windows} texts, "
            f"{self.own} of them its own, in {self.seconds / 60:.1f} minutes"
        )
        return "\n".join([*head, said, *(f"note: {note}" for note in self.notes)])


def convert_fitted(
    source_name: str, output: Path, wishes: ConvertOptions, options: FitOptions, on_progress: OnProgress
) -> FitResult:
    """Convert a source and fit the result's weights to it. Raises SpqtError and its kinds.

    on_progress: called with (done, total, what) before each unit of work; every loop counts its own.
    """
    converter.check_options(wishes)
    options.check()
    output = files.expanded(output).absolute()
    trust = source.Trust(wishes.trust_remote_code, wishes.allow_requantize, wishes.zigzag_experts)
    checkpoint = source.open_source(source_name, wishes.revision, trust)
    found: list[ConvertResult] = []

    def rounded(target: Path) -> None:
        found.append(converter.convert(source_name, target, wishes, on_progress))

    job = {"convert": dataclasses.asdict(wishes)}
    files.check_target(output, files.expanded(source_name))
    with files.claim(output):
        files.check_target(output, files.expanded(source_name))
        result = _Fit(output, checkpoint, options, job, on_progress).run(rounded)
    if found:
        found[0].output = output
        result.conversion = found[0]
    return result


def fit(
    model: Path, source_name: str, output: Path, options: FitOptions, on_progress: OnProgress
) -> FitResult:
    """Fit a folder that is converted already to its source, into another folder.

    Raises SpqtError where the source is not the folder's.
    """
    options.check()
    folder, output = Folder(model), files.expanded(output).absolute()
    checkpoint = source_model.open_source(source_name)
    if folder.config["spqt"].get("fit"):
        raise SpqtError(f"{model} is fitted already", "convert its source again")
    if folder.config["spqt"].get("adapter"):
        raise SpqtError(f"{model} holds an adapter, which its source does not", "fit first, then fuse")
    origin = folder.config["spqt"].get("source")
    if not isinstance(origin, dict) or origin.get("headers") != checkpoint.identity()["headers"]:
        raise SpqtError(f"{source_name} is not what {model} was converted from", "name its source")
    files.check_target(output, model)
    with files.claim(output):
        files.check_target(output, model)
        job = {"weights": folder.weights_fingerprint}
        return _Fit(output, checkpoint, options, job, on_progress).run(
            lambda target: copy_folder(folder.path, target)
        )


class _Fit:
    """One fit at work in its work folder."""

    def __init__(
        self,
        output: Path,
        checkpoint: Checkpoint,
        options: FitOptions,
        job: dict[str, Any],
        on_progress: OnProgress,
    ) -> None:
        ask_for_float32()
        options = options.settled()
        self._output, self._checkpoint, self._options = output, checkpoint, options
        self._on_progress, self._started = on_progress, time.monotonic()
        data = None if options.data is None else texts.read(options.data).sha256
        wanted = {"fit": {**dataclasses.asdict(options), "data": data}, "stamps": checkpoint.stamps(), **job}
        name = job_id({**wanted, "versions": [__version__, version("mlx"), version("mlx-lm")]})
        self._notes: list[str] = []
        self._work = self._work_folder(name)
        self._journal = Journal(self._work, name)
        self._folder = self._work / "model"

    def _work_folder(self, job: str) -> Path:
        for folder in files.work_folders(self._output):
            if Journal.belongs(folder, job):
                return folder
            self._notes.append(f"{folder} is left from another conversion; delete it")
        return files.new_work_folder(self._output)

    def run(self, rounded: Callable[[Path], None]) -> FitResult:
        """Fit what `rounded` writes into the folder that it is given, and publish it."""
        if not self._folder.exists():
            self._round(rounded)
        said = self._journal.done.get(FITTED)
        if said is None:
            with heap.kept():
                said = self._fitted()
            self._journal.note(FITTED, said)
        with WeightsFile(self._folder) as output:
            output.finish("fit", said["config"])
        Folder(self._folder)
        with files.disk_errors(self._folder):
            card.update(self._folder)
        files.publish(self._folder, self._output)
        with files.disk_errors(self._work):
            shutil.rmtree(self._work)
        return FitResult(
            output=self._output,
            method=self._options.method,
            windows=said["config"]["windows"],
            own=said["config"]["own"],
            text_sha256=said["config"]["text"],
            layers=said["layers"],
            seconds=time.monotonic() - self._started,
            notes=[*self._notes, *said["notes"]],
        )

    def _round(self, rounded: Callable[[Path], None]) -> None:
        """The rounded folder, whole or not at all."""
        target = self._work / "rounded"
        if not target.exists():
            rounded(target)
        for key in [key for key in self._journal.done if key != FITTED]:
            self._journal.forget(key)
        with files.disk_errors(target):
            os.rename(target, self._folder)

    def _fitted(self) -> dict[str, Any]:
        """Fit the weights; what is to be said of it."""
        loaded = session.load_lazily(Folder(self._folder))
        layers = dict(zigzag_layers(loaded.model))
        self._say_cost(loaded)
        chosen = self._text(loaded)
        windows = np.random.default_rng(self._options.seed).permutation(chosen.windows)
        store = Store(self._work / "states", room())
        with WeightsFile(self._folder) as output:
            notes = self._rounded_for_inputs(loaded, windows[: self._options.rounded_on], store, output)
            trained = {}
            if self._options.method == "full":
                try:
                    trained = self._trained(windows, store, output)
                except UnsupportedError as error:
                    notes.append(f"{error.cause}; so scales and norms are not trained")
        config = {
            "method": self._options.method,
            "windows": len(chosen.windows),
            "own": chosen.own,
            "window": int(chosen.windows.shape[1]),
            "text": chosen.sha256,
            "seed": self._options.seed,
            **trained,
        }
        if trained and not trained["trained"]:
            notes.append("training brought nothing on texts held out: scales and norms stay as they were")
        return {"config": config, "layers": len(layers), "notes": [*chosen.notes, *notes]}

    def _rounded_for_inputs(
        self, loaded: session.Loaded, windows: np.ndarray, store: Store, output: WeightsFile
    ) -> list[str]:
        """Round the weights for the inputs that they will see; lines for people."""
        done = self._journal.done.get(ROUNDED)
        if done is not None:  # its tensors may have changed since
            return list(done)
        source = SourceBlocks(self._checkpoint, list(linear_layers(loaded.model)), windows.shape[1])
        compression = Compression(loaded, source, windows, store, self._on_progress)
        notes = []
        if source.walk is None:
            notes.append("the blocks of this model can't be passed one by one: all were in memory")
        compression.run(output, self._journal)
        experts = zigzag_layers(loaded.model).keys() - compression.layers.keys()
        notes += lines(
            compression.notes | dict.fromkeys(sorted(experts), "plainly rounded: they are experts")
        )
        self._journal.note(ROUNDED, notes)
        return notes

    def _trained(self, windows: np.ndarray, store: Store, output: WeightsFile) -> dict[str, Any]:
        """Train scales, biases and norms; what config.json says of it."""
        loaded = session.load_lazily(Folder(self._folder))
        source = SourceBlocks(self._checkpoint, list(linear_layers(loaded.model)), windows.shape[1])
        wishes = self._options
        assert wishes.steps is not None
        assert wishes.batch is not None
        assert wishes.sparsities is not None
        assert wishes.scored is not None
        options = distill.Options(
            steps=wishes.steps,
            batch=wishes.batch,
            sparsities=wishes.sparsities,
            scored=wishes.scored,
            seed=wishes.seed,
        )
        training = distill.Distillation(loaded, source, windows, store, self._on_progress, options)
        found = training.run(output, self._journal)
        return {"steps": found.steps, "loss": [found.first, found.last], "trained": found.kept}

    def _say_cost(self, loaded: session.Loaded) -> None:
        """Tell how long it will take, before it begins."""
        from mlx_lm.utils import get_total_parameters

        layers, weights = linear_layers(loaded.model), get_total_parameters(loaded.model)
        time_taken = cost.words(cost.of_options(layers.values(), weights, self._options))
        memory = cost.memory(layers, cost.source_bytes(self._checkpoint), self._options)
        note(
            f"fitting takes {time_taken} and about {memory / 1e9:.1f} GB of memory here; "
            "an interrupted run goes on where it stopped"
        )

    def _openings_each(self) -> int:
        assert self._options.openings_each is not None  # settled
        return self._options.openings_each

    def _text(self, loaded: session.Loaded) -> text.FitText:
        options = self._options
        limit = context.tokens(loaded.config)
        window, note = context.window(limit, None if options.window == 512 else options.window, 512)
        wished = text.TextOptions(
            own=options.own or 0,
            length=window // 2 * 2,
            seed=options.seed,
            data=options.data,
            openings_each=self._openings_each(),
        )
        found = text.prepare(
            self._work, self._checkpoint.identity(), wished, loaded.tokenizer, self._write, self._on_progress
        )
        if np.max(found.windows) >= (loaded.folder.size("vocab_size") or np.inf):
            session.known(loaded, found.windows.ravel().tolist())
        return dataclasses.replace(found, notes=(*found.notes, *filter(None, [note])))

    def _write(self, count: int, length: int, seed: int, on_progress: OnProgress) -> np.ndarray:
        """Text by the source, which is in memory only for as long as it writes."""
        on_progress(0, 1, "loading the source")
        needed = cost.source_bytes(self._checkpoint)
        room = EIGHT_BITS_FIT * psutil.virtual_memory().available
        if needed / 4 > room:
            raise ResourceError(
                "the source does not fit in memory to write its own text",
                "give a text: --own-text 0 --data FILE",
            )
        rows = source_model.eight_bits(self._checkpoint) if needed > room else None
        if rows is not None:
            self._notes.append("the source wrote its text in 8 bits: in 16 it does not fit in memory")
        model = source_model.build(self._checkpoint, rows)
        wishes = own_text.Wishes(count, length, seed, self._openings_each())
        return own_text.windows(model, _tokenizer(self._folder), wishes, on_progress)


def _tokenizer(folder: Path) -> Any:
    return session.load_tokenizer(folder)
