"""`spqt calibrate`: choose each layer's threshold by running the converted model over text.

It rewrites config.json once, at the end, and nothing else: weights stay untouched, and a run that is
cut off leaves the model as it was, its progress in a file beside.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from spqt_cli.calibrate import speed, targets
from spqt_cli.calibrate.measurements import FIRST_TOKENS, Workbench, windows_done
from spqt_cli.calibrate.methods import CANDIDATES, Search, layer_row, steps
from spqt_cli.calibrate.progress import Progress
from spqt_cli.calibrate.result import Calibration, LayerRow, Tried, print_table
from spqt_cli.calibrate.stream import engine, paging
from spqt_cli.decode import context, session
from spqt_cli.errors import SpqtError, UnsupportedError, UsageError
from spqt_cli.format import thresholds
from spqt_cli.format.contract import ThresholdsError
from spqt_cli.format.folder import Folder, remove_thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES, default_sparsity
from spqt_cli.measure import probes, texts
from spqt_cli.system import files

__all__ = ["CalibrateOptions", "Calibration", "LayerRow", "calibrate", "print_table", "remove"]

MIN_WINDOW = 32
WINDOW = 512  # tokens, where none are asked for
OnProgress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """sparsity: share to skip, None for the default of the model's size. data: a text file, None for
    the shipped one. tokens: of text run in all, a quarter of them held out to check the result.
    window: tokens per sequence, the first half a prompt; None: 512, or what the context allows.
    seed: picks the windows. method: a key of methods.CANDIDATES. restart: drop an unfinished run's progress.
    max_kl, max_ppl_increase: instead of a sparsity, the highest one whose KL to dense (nats) or rise of
    perplexity (percent) on held-out text stays under this. min_tokens_per_second: instead, the lowest
    one that decodes so fast on this machine. stream: load one block of weights at a time; None: if the
    weights don't fit in memory.
    """

    sparsity: float | None = None
    data: Path | None = None
    tokens: int = 4096
    window: int | None = None
    seed: int = 0
    method: str = "auto"
    restart: bool = False
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_tokens_per_second: float | None = None
    stream: bool | None = None

    def goal(self) -> targets.Goal | None:
        """The limit on the cost, if one was given."""
        if self.max_kl is not None:
            return targets.Goal(self.max_kl, kl=True)
        if self.max_ppl_increase is not None:
            return targets.Goal(self.max_ppl_increase, kl=False)
        return None


def calibrate(path: Path, options: CalibrateOptions, on_progress: OnProgress) -> Calibration:
    """Write thresholds into a converted folder's config.json and return what they reach.

    Raises SpqtError (3) for a text that is missing, not UTF-8 or too short, BusyError (7) when an
    unfinished calibration with other settings is there, UsageError (2) for values out of range.
    """
    _check_options(options)
    text = texts.read(options.data)
    folder = _open(path)
    _check_writable(path)
    with files.claim(path):
        if paging.wanted(path, options):
            try:
                return _calibrate(folder, text, paging.stepped_down(path, options), on_progress)
            except UnsupportedError as error:
                if options.stream:
                    raise
                paging.note(f"{error.cause}; so the whole model is loaded")
                options = replace(options, restart=True)
        return _calibrate(folder, text, replace(options, stream=False), on_progress)


def _calibrate(
    folder: Folder, text: texts.Text, options: CalibrateOptions, on_progress: OnProgress
) -> Calibration:
    started = time.monotonic()
    loaded = session.load_lazily(folder) if options.stream else session.load(folder, dense=True)
    run = _Run(loaded, text, options, on_progress)
    try:
        result = run.finish(started)
    except UnsupportedError:
        run.progress.clear()  # there is nothing to finish: another method may be tried at once
        paging.clear(folder.path)
        raise
    run.progress.clear()
    paging.clear(folder.path)
    return result


def remove(path: Path) -> None:
    """Take all thresholds out of a converted folder: it runs dense again."""
    with files.claim(path), files.disk_errors(path):
        remove_thresholds(path)


def _check_options(options: CalibrateOptions) -> None:
    limits = (options.max_kl, options.max_ppl_increase, options.min_tokens_per_second)
    if sum(goal is not None for goal in (options.sparsity, *limits)) > 1:
        raise UsageError(
            "a sparsity, a KL, a rise of perplexity and a speed exclude one another", "give one of them"
        )
    if any(limit is not None and not (limit > 0 and math.isfinite(limit)) for limit in limits):
        raise UsageError("a KL, a rise of perplexity or a speed must be a positive number", "--max-kl 0.1")
    thresholds.check_sparsity(options.sparsity)
    if options.method not in CANDIDATES:
        raise UsageError(f"there is no method {options.method!r}", f"use one of: {', '.join(CANDIDATES)}")
    if min(options.tokens // 2, options.window or WINDOW) < MIN_WINDOW:
        raise UsageError(
            f"{options.tokens} tokens in windows of {options.window or WINDOW} are too few",
            f"use at least {2 * MIN_WINDOW} tokens and windows of {MIN_WINDOW}",
        )


def _open(path: Path) -> Folder:
    """The folder to calibrate. Thresholds that are damaged or of other weights, which no other command
    accepts, are what calibration replaces: they are removed first.
    """
    try:
        return Folder(path)
    except ThresholdsError:
        remove(path)
        return Folder(path)


def _check_writable(path: Path) -> None:
    """Refuse a folder that can't be written before hours of work."""
    with files.disk_errors(path), tempfile.TemporaryFile(dir=path, prefix=".spqt-"):
        pass


def _window(loaded: session.Loaded, options: CalibrateOptions) -> tuple[int, str]:
    """(tokens of each window, a line for people where the model's context shortens them)."""
    limit = context.tokens(loaded.config)
    if limit is not None and limit < MIN_WINDOW:
        raise SpqtError(f"{loaded.folder} has a context of {limit} tokens", "convert the model again")
    window, note = context.window(limit, options.window, WINDOW)
    most = options.tokens // 2
    return min(window, most) // 2 * 2, note if window <= most else ""


def choose_windows(
    loaded: session.Loaded, text: texts.Text, options: CalibrateOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The windows to calibrate on and the ones held out: (count, window) each, int32."""
    window = _window(loaded, options)[0]
    stream = session.known(loaded, texts.tokens(text, loaded.tokenizer))
    rows = texts.windows(stream, window, texts.opening(loaded.tokenizer))
    count = options.tokens // window
    texts.need(rows, count, text)
    chosen = np.random.default_rng(options.seed).permutation(len(rows))[:count]
    held_out = max(1, count // 4)
    return rows[np.sort(chosen[held_out:])], rows[np.sort(chosen[:held_out])]


class _Run:
    """One calibration: histograms, thresholds, the check on held-out windows."""

    def __init__(
        self, loaded: session.Loaded, text: texts.Text, options: CalibrateOptions, on_progress: OnProgress
    ) -> None:
        from mlx_lm.utils import get_total_parameters

        self.loaded, self.text, self.options, self.on_progress = loaded, text, options, on_progress
        self.rows, self.held_out = choose_windows(loaded, text, options)
        self.note = _window(loaded, options)[1]
        self.weights = get_total_parameters(loaded.model)
        identity = {
            "model": loaded.folder.weights_fingerprint,
            "text": text.sha256,
            "first": FIRST_TOKENS,
            "goal": [
                options.method,
                options.sparsity,
                options.max_kl,
                options.max_ppl_increase,
                options.min_tokens_per_second,
            ],
            "windows": [len(self.rows), self.rows.shape[1], options.seed, options.stream],
        }
        self.progress = Progress(loaded.folder.path, identity, options.restart)
        self.done = windows_done(self.progress)
        self.steps = steps(options.method, len(self.rows), len(self.held_out))

    def finish(self, started: float) -> Calibration:
        """Run all of it and write the result into config.json."""
        with probes.probing(self.loaded.model) as harness:
            bench = Workbench(self.loaded.model, harness, (self.rows, self.held_out), self.progress)
            stream = engine.Stream(bench, self.loaded.folder.path) if self.options.stream else None
            counts = {} if stream else bench.histograms(self._step)
            live = {path: seen for path, seen in counts.items() if not thresholds.is_dead(seen)}
            target, rate = self._target(bench, live)
            if stream:
                self.steps = stream.steps(self.options.method)
                counts, candidates = stream.run(self.options.method, target, self._step)
                live = {path: counts[path] for path in candidates[0].chosen}
            search = Search(bench, live, target)
            if not stream:
                candidates = search.run(self.options.method, self._step)
            best = candidates[0]
            curves = search.curves(best, self.options.method, None if stream else self._step)
            tried = [Tried(one.name, one.mean_kl, one.kl, search.overall(one)) for one in candidates]
        rows = [layer_row(path, best, target, counts.get(path)) for path in harness.layers]
        zeros = {row.path: row.zeros for row in rows}
        result = Calibration(
            folder=self.loaded.folder.path,
            sparsity=target,
            realised=tried[0].realised,
            method=self.options.method,
            tried=tried,
            text=self.text.name,
            tokens=self.rows.size,
            held_out_tokens=self.held_out.shape[0] * (self.held_out.shape[1] // 2),
            seconds=time.monotonic() - started,
            layers=rows,
            tokens_per_second=rate,
            lossless=probes.weighted(zeros, harness.layers),
            note="; ".join(filter(None, [self.note, search.without_gradients])),
        )
        self._store(result, curves)
        return result

    def _target(self, bench: Workbench, live: dict[str, np.ndarray]) -> tuple[float, float | None]:
        """The share to skip: as asked, as the goal allows, or by the model's size; and, where a speed was
        asked for, the tokens per second measured there.
        """
        options = self.options
        if options.sparsity is not None:
            return options.sparsity, None
        default = default_sparsity(self.weights)
        search = Search(bench, live, default)
        try:
            if (wanted := options.min_tokens_per_second) is not None:
                rate = speed.Pace(self.loaded, bench.harness, self.rows[0]).tokens_per_second
                return targets.lowest_share(search, options.method, wanted, rate, self._step)
            goal = options.goal()
            if goal is None:
                return default, None
            return targets.highest_share(search, options.method, goal, self._step), None
        except targets.OutOfReachError:
            self.progress.clear()  # there is nothing to finish: another goal may be tried at once
            raise

    def _step(self, what: str) -> None:
        self.on_progress(self.done, max(self.steps, self.done), what)
        self.done += 1

    def _store(self, result: Calibration, curves: dict[str, list[float]]) -> None:
        flat = [0.0] * len(CURVE_SPARSITIES)
        chosen = {
            row.path: (_short(row.threshold), [_short(value) for value in curves.get(row.path, flat)])
            for row in result.layers
        }
        record = {
            "method": result.method,
            "tried": [asdict(tried) for tried in result.tried],
            "sparsity": result.sparsity,
            "realised": round(result.realised, 4),
            "kl": _short(result.tried[0].kl),
            "text": {"name": Path(result.text).name, "sha256": self.text.sha256},
            "tokens": result.tokens,
            "window": int(self.rows.shape[1]),
            "seed": self.options.seed,
            "layers": {row.path: row.stored() for row in result.layers},
        }
        with files.disk_errors(self.loaded.folder.path):
            self.loaded.folder.write_calibration(chosen, record)


def _short(value: float) -> float:
    """Six digits: a float32 threshold's worth, at half the length in config.json."""
    return float(f"{value:.6g}")
