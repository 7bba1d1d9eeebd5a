"""`spqt calibrate`: choose each layer's threshold by running the converted model over text.

It rewrites config.json once, at the end, and nothing else: weights stay untouched, and an interrupted run
leaves the model as it was, with its progress in files of the folder.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.calibrate import cost, greedy, speed, targets
from spqt_cli.calibrate.curves import curves
from spqt_cli.calibrate.gradients import SPARSITIES
from spqt_cli.calibrate.measurements import FIRST_TOKENS, Candidate, Measurements, OnProgress
from spqt_cli.calibrate.memory import InMemory
from spqt_cli.calibrate.methods import METHODS, STREAMED_METHODS, Method, candidates
from spqt_cli.calibrate.options import MIN_WINDOW, WINDOW, CalibrateOptions, note
from spqt_cli.calibrate.progress import Progress
from spqt_cli.calibrate.result import Calibration, LayerRow, Tried, print_table
from spqt_cli.calibrate.stream import blocks
from spqt_cli.calibrate.stream.engine import Streamed
from spqt_cli.convert import card
from spqt_cli.decode import context, session
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.format.contract import ThresholdsError
from spqt_cli.format.folder import Folder, remove_thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES, default_sparsity
from spqt_cli.measure import probes, texts
from spqt_cli.system import files

__all__ = ["CalibrateOptions", "Calibration", "LayerRow", "calibrate", "print_table", "remove"]


def calibrate(
    path: Path,
    options: CalibrateOptions,
    on_progress: OnProgress,
    on_estimate: Callable[[float], None] = lambda _: None,
) -> Calibration:
    """Write thresholds into a converted folder's config.json and return what they reach.

    on_progress: called with (done, total, what) before each unit of work; every loop counts its own.
    on_estimate: called once, when the model is loaded, with the seconds that the rest will take.
    Raises SpqtError (3) for a text that is missing, not UTF-8 or too short, BusyError (7) when an
    unfinished calibration with other settings is there, UsageError (2) for values out of range.
    """
    options.check()
    text = texts.read(options.data)
    folder = _open(path)
    _check_writable(path)
    with files.claim(path):
        if options.stream or (options.stream is None and not blocks.fit_in_memory(path)):
            try:
                return _Run(folder, text, options.streamed(), on_progress).finish(on_estimate)
            except UnsupportedError as error:
                if options.stream:
                    raise
                note(f"{error.cause}; so the whole model is loaded")
                options = replace(options, restart=True)
        return _Run(folder, text, replace(options, stream=False), on_progress).finish(on_estimate)


class _Run:
    """One calibration: the windows, the measurements, what is stored."""

    def __init__(
        self, folder: Folder, text: texts.Text, options: CalibrateOptions, on_progress: OnProgress
    ) -> None:
        from mlx_lm.utils import get_total_parameters

        self._started = time.monotonic()
        self.loaded = session.load_lazily(folder) if options.stream else session.load(folder, dense=True)
        self.weights = get_total_parameters(self.loaded.model)
        self.default = default_sparsity(self.weights)
        self.text, self.options, self.on_progress = text, options, on_progress
        self.windows, self.note = choose_windows(self.loaded, text, options), _window(self.loaded, options)[1]
        self.progress = Progress(folder.path, self._identity(), options.restart)

    def finish(self, on_estimate: Callable[[float], None]) -> Calibration:
        """Choose the thresholds, write them into config.json, and return what they reach."""
        try:
            with probes.probing(self.loaded.model) as harness:
                on_estimate(self._seconds(harness))
                measurements, method, target, rate = self._begin(harness)
                found = candidates(measurements, method, target)
        except (UnsupportedError, targets.OutOfReachError):
            self.progress.clear()  # there is nothing to finish: another method or target may be tried
            raise
        best, counts = found[0], measurements.counts
        rows = [_row(path, best, target, counts.get(path)) for path in measurements.layers]
        rows = [_priced(row, measurements.costs.get(row.path)) for row in rows]
        tried = [
            Tried(one.name, one.mean_kl, one.kl, probes.weighted(one.realised, measurements.layers))
            for one in found
        ]
        calibrating, held_out = self.windows
        result = Calibration(
            folder=self.loaded.folder.path,
            sparsity=target,
            realised=tried[0].realised,
            method=self.options.method,
            tried=tried,
            text=self.text.name,
            tokens=calibrating.size,
            held_out_tokens=held_out.shape[0] * (held_out.shape[1] // 2),
            seconds=time.monotonic() - self._started,
            layers=rows,
            tokens_per_second=rate,
            lossless=probes.weighted({row.path: row.zeros for row in rows}, measurements.layers),
            note="; ".join(filter(None, [self.note, best.note])),
        )
        self._store(result, curves(best, counts, target), counts)
        return result

    def _seconds(self, harness: probes.Harness) -> float:
        """How long the rest will take on this machine."""
        options, saved, (rows, held_out) = self.options, self.progress.arrays, self.windows
        done = (int(saved.get(name, 0)) for name in ("windows", "gradients"))
        windows = cost.Windows(len(rows), len(held_out), rows.shape[1], *done)
        return _seconds(harness.layers, self.weights, windows, options)

    def _begin(self, harness: probes.Harness) -> tuple[Measurements, Method, float, float | None]:
        """The measurements, the method, the sparsity to reach and, where a speed was asked for, the tokens
        per second measured there.

        The only place that picks an engine.
        """
        options = self.options
        measured_on = (self.loaded.model, harness, self.windows, self.progress, self.on_progress)
        target, rate = options.sparsity, None
        measurements: Measurements
        if options.stream:
            measurements, method = Streamed(*measured_on), STREAMED_METHODS[options.method]
        else:
            measurements = whole = InMemory(*measured_on)
            method = METHODS[options.method]
            if (limit := options.limit()) is not None:
                target = targets.highest_sparsity(whole, method, limit)
            elif (wanted := options.min_tokens_per_second) is not None:
                pace = speed.Pace(self.loaded, harness, self.windows[0][0]).tokens_per_second
                target, rate = targets.lowest_sparsity(whole, method, wanted, pace, self.on_progress)
        return measurements, method, self.default if target is None else target, rate

    def _identity(self) -> dict[str, Any]:
        """What a run must agree in to go on with the progress of an interrupted one."""
        options, (rows, _) = self.options, self.windows
        limits = (options.max_kl, options.max_ppl_increase, options.min_tokens_per_second)
        return {
            "model": self.loaded.folder.weights_fingerprint,
            "text": self.text.sha256,
            "first": FIRST_TOKENS,
            "goal": [options.method, options.sparsity, *limits],
            "windows": [len(rows), rows.shape[1], options.seed, options.stream],
        }

    def _store(
        self, result: Calibration, curves_of: Mapping[str, list[float]], counts: Mapping[str, np.ndarray]
    ) -> None:
        """Write the thresholds and the calibration section into config.json."""
        flat = [0.0] * len(CURVE_SPARSITIES)
        chosen = {
            row.path: (_short(row.threshold), [_short(value) for value in curves_of.get(row.path, flat)])
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
            "window": int(self.windows[0].shape[1]),
            "seed": self.options.seed,
            "layers": {row.path: row.stored() for row in result.layers},
            "quantiles": {path: found for path, seen in counts.items() if (found := _quantiles(seen))},
        }
        folder = self.loaded.folder
        with files.disk_errors(folder.path):
            folder.write_calibration(chosen, record)
            card.update(folder.path)
        self.progress.clear()


def expected_seconds(
    layers: Mapping[str, cost.Sized], weights: int, config: dict[str, Any], options: CalibrateOptions
) -> float:
    """How long a calibration of a model that is not there yet would take here, with text enough.

    layers: path -> Zigzag layer. weights: of the whole model. config: as it will be.
    """
    windows = cost.Windows.of(options.tokens, _window_of(config, "the model", options)[0])
    return _seconds(layers, weights, windows, options)


def _seconds(
    layers: Mapping[str, cost.Sized], weights: int, windows: cost.Windows, options: CalibrateOptions
) -> float:
    method = (STREAMED_METHODS if options.stream else METHODS)[options.method]
    searches = options.limit() is not None
    return cost.seconds(
        layers, weights, cost.work(windows, method, greedy.largest_block(layers), searches=searches)
    )


def _window(loaded: session.Loaded, options: CalibrateOptions) -> tuple[int, str]:
    return _window_of(loaded.config, str(loaded.folder), options)


def _window_of(config: dict[str, Any], where: str, options: CalibrateOptions) -> tuple[int, str]:
    """(tokens of each window, one line where the model's context shortens them, or "")."""
    limit = context.tokens(config)
    if limit is not None and limit < MIN_WINDOW:
        raise SpqtError(f"{where} has a context of {limit} tokens", "convert the model again")
    window, said = context.window(limit, options.window, WINDOW)
    most = options.tokens // 2
    return min(window, most) // 2 * 2, said if window <= most else ""


def choose_windows(
    loaded: session.Loaded, text: texts.Text, options: CalibrateOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The windows to calibrate on and the ones held out: (count, window) each, int32."""
    window = _window(loaded, options)[0]
    stream = session.known(loaded, texts.tokens(text, loaded.tokenizer))
    rows = texts.windows(stream, window, texts.opening(loaded.tokenizer))
    count = options.tokens // window
    texts.need(rows, count, text, len(stream), "--tokens")
    chosen = np.random.default_rng(options.seed).permutation(len(rows))[:count]
    held_out = cost.Windows.of(options.tokens, window).held_out
    return rows[np.sort(chosen[held_out:])], rows[np.sort(chosen[:held_out])]


def _row(path: str, best: Candidate, target: float, counts: np.ndarray | None) -> LayerRow:
    """What a layer got. counts: its histogram; None where the text never reached it."""
    if counts is None:
        return LayerRow(path, 0.0, 0.0, 0.0, False, unreached=True)
    if path not in best.thresholds:
        return LayerRow(path, 0.0, 0.0, 0.0, True)
    zeros = thresholds.zeros(counts) if thresholds.lossless(counts) else 0.0
    realised = best.realised.get(path, 0.0)
    return LayerRow(path, best.at(target)[path], best.thresholds[path], realised, False, zeros)


def _priced(row: LayerRow, costs: np.ndarray | None) -> LayerRow:
    """A row with the price of its share. costs: of each of SPARSITIES, nats a token; None where not known."""
    if costs is None:
        return row
    return replace(row, price=float(np.interp(row.target, SPARSITIES, costs)))


def _quantiles(counts: np.ndarray) -> list[float]:
    """Of a layer's |x|, at thresholds.QUANTILES, in the digits that a picture needs; [] of none."""
    if not counts[: thresholds.FINITE_BINS].any():
        return []
    return [float(f"{value:.4g}") for value in thresholds.quantile(counts, thresholds.QUANTILES)]


def _short(value: float) -> float:
    """Six digits: a float32 threshold's worth, at half the length in config.json."""
    return float(f"{value:.6g}")


def remove(path: Path) -> None:
    """Take all thresholds out of a converted folder: it runs dense again."""
    with files.claim(path), files.disk_errors(path):
        remove_thresholds(path)
        card.update(path)


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
