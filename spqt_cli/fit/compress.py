"""Error-compensating rounding of a whole model, one block of weights in memory at a time.

Two models pass over the text block by block: the source, and the compressed model as far as it is done, with
channels skipped at decode positions. Layers that share an input are rounded together, for the inputs that
they will see, before the next ones' inputs are computed. The states between blocks lie on disk, so that a run
that was stopped goes on at its block.

Source: GPTQ (arXiv 2210.17323) in order of the Hessian's diagonal; targets from the source's own inputs as in
GPTAQ (arXiv 2504.02692), of which a part is taken.
"""

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.calibrate.stream.blocks import Block, Blocks, undivided
from spqt_cli.convert.journal import Journal
from spqt_cli.decode.layers import ZigzagLinear, linear_layers
from spqt_cli.decode.session import Loaded
from spqt_cli.fit import gptq, masks
from spqt_cli.fit.hessian_gpu import inputs_of, on_device
from spqt_cli.fit.products import Gram, Values, gained, joined, masked, times
from spqt_cli.fit.source_blocks import SourceBlocks
from spqt_cli.fit.store import Store
from spqt_cli.fit.suspended import Suspended, tap
from spqt_cli.fit.weights_file import WeightsFile
from spqt_cli.format import layout
from spqt_cli.measure import many_rows, probes
from spqt_cli.system import heap

ALPHA = 0.25  # of the way from the compressed model's target to the source's
HELD_OUT = 8  # one text of so many decides whether that way is worth going
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 1 << 30}  # of activations in a block: texts that pass together
FEWEST = 0.25  # rows for each input of a layer: one that saw fewer keeps its rounding

OnProgress = Callable[[float, float, str], None]
PARTS = ("weight", "scales", "biases")


@dataclass
class _Site:
    """Layers that share an input, rounded for it. threshold: on |x| in decode steps; 0 skips nothing.

    w: (inputs, outputs of all layers), rounded.
    """

    paths: list[str]
    threshold: float
    w: Any


@dataclass
class _Sums:
    """Sums over texts at one input: X^T X and (S - X)^T X, of those to fit on and of those held out."""

    fitted: Gram = field(default_factory=Gram)
    held_out: Gram = field(default_factory=Gram)

    @property
    def rows(self) -> int:
        return self.fitted.rows + self.held_out.rows

    def hessian(self) -> Any:
        """X^T X over all texts. The sums are given up: the factorization takes their room."""
        parts = [part for part in (self.fitted, self.held_out) if part.rows]
        whole = parts[0].give_up(on_device())
        for part in parts[1:]:
            whole += part.give_up(on_device())
        return whole


class Compression:
    """The pass over all blocks; `run` it once. notes: path -> why a layer was rounded otherwise."""

    def __init__(
        self,
        rounded: Loaded,
        source: SourceBlocks,
        windows: np.ndarray,
        store: Store,
        on_progress: OnProgress,
    ) -> None:
        """rounded: the converted model, loaded lazily. windows: (texts, window) tokens, window even."""
        self._source, self._windows, self._store = source, windows, store
        self._on_progress = on_progress
        self.layers: dict[str, ZigzagLinear] = linear_layers(rounded.model)
        self.notes: dict[str, str] = {}
        tap(rounded.model, {path: layer.outputs for path, layer in self.layers.items()})
        self._walk: Blocks | None = None
        if source.walk is None:
            self.blocks = [undivided(rounded.model, self.layers)]
        else:
            self._walk = Blocks(rounded.model, self.layers, rounded.folder.path)
            self.blocks = self._walk.blocks(windows.shape[1])
        self._chunks = self._cut()
        self._together: list[list[str]] = []  # paths of the block's layers that share an input

    def _cut(self) -> list[slice]:
        """Texts that are computed together; those held out are chunks of their own, at the end."""
        count, window = self._windows.shape
        widest = max(max(layer.inputs, layer.outputs) for layer in self.layers.values())
        room = CHUNK_BYTES["cpu" if many_rows.on_cpu() else "gpu"]
        size = max(1, room // (4 * window * widest))
        self._fitted = count - (count // HELD_OUT or (count > 1))
        cuts = sorted({*range(0, self._fitted, size), *range(self._fitted, count, size), count})
        return [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def run(self, output: WeightsFile, journal: Journal) -> None:
        """Round every block that the journal does not have yet, into `output`."""
        done = self._resume(output, journal)
        with many_rows.many_rows(heads=False, gradients=False):
            if not done:
                self._embed()
            for number, block in enumerate(self.blocks):
                if number < done:
                    self._source.pass_over(self._source.blocks[number])
                    continue
                self._on_progress(number, len(self.blocks), "fitting blocks")
                written = self._round(number, block, output)
                journal.note(f"block {number}", {"written": written, "notes": self._notes_of(block)})
                self._store.drop(f"*-{number}-*")
                if self._walk is not None:
                    self._walk.drop(number)

    def _resume(self, output: WeightsFile, journal: Journal) -> int:
        """The blocks that an earlier run did, if what it left is whole."""
        done = 0
        while f"block {done}" in journal.done:
            done += 1
        for number in range(done):
            noted = journal.done[f"block {number}"]
            if any(output.sha256(name) != wanted for name, wanted in noted["written"].items()):
                return 0
            self.notes |= noted["notes"]
        states = [f"{kind}-{done}-{c}" for kind in ("source", "x") for c in range(len(self._chunks))]
        return done if all(map(self._store.has, states)) else 0

    def _notes_of(self, block: Block) -> dict[str, str]:
        return {path: self.notes[path] for path in block.paths if path in self.notes}

    def _embed(self) -> None:
        """What enters the first block of both models."""
        for c, texts in enumerate(self._chunks):
            entering = self._source.entering(self._windows[texts])
            self._store.save(f"source-0-{c}", entering)
            ours = entering if self._walk is None else self._walk.embedded(self._windows[texts])
            self._store.save(f"x-0-{c}", ours)

    def _round(self, number: int, block: Block, output: WeightsFile) -> dict[str, str]:
        """Round a block's layers; tensor -> SHA-256 of what was written."""
        theirs = self._source.blocks[number]
        self._source.fill(theirs)
        self._pass_source(number, theirs)
        rounded: dict[str, _Site] = {}
        with ExitStack() as ending:
            runs = []
            for c in range(len(self._chunks)):
                runs.append(Suspended(block.run, self._store.load(f"x-{number}-{c}")))
                ending.callback(runs[-1].close)
            while waiting := {run.path for run in runs if run.path}:
                path = min(waiting, key=block.paths.index)
                if path not in rounded:
                    site = self._round_site(number, path, runs, output)
                    rounded |= dict.fromkeys(site.paths, site)
                for run in runs:
                    if run.path == path:
                        run.go_on(self._products(rounded[path], run.x))
        for path in set(block.paths) - set(rounded):
            self.notes[path] = "plainly rounded: the text never reached it"
        self._source.drop(theirs)
        for c, run in enumerate(runs):
            self._store.save(f"x-{number + 1}-{c}", run.result)
        return {
            f"{path}.{part}": output.sha256(f"{path}.{part}") for path in sorted(rounded) for part in PARTS
        }

    def _pass_source(self, number: int, block: Block) -> None:
        """Run the source's block, and keep what enters its layers, once where they share an input."""
        paths = {id(self._source.modules[path]): path for path in block.paths}
        c, sites, last = 0, dict[str, list[str]](), None

        def watch(module: nn.Module, call: Any, x: mx.array) -> mx.array:
            nonlocal last
            path = paths[id(module)]
            if last is not None and last[1] is x:
                sites[last[0]].append(path)
            elif path not in sites:
                sites[path], last = [path], (path, x)
                self._store.save(f"input-{number}-{c}-{path}", x, short=True)
            return call(module, x)

        with probes.hooked([self._source.modules[path] for path in block.paths], watch):
            for c in range(len(self._chunks)):
                sites, last = {}, None
                out = block.run(self._store.load(f"source-{number}-{c}"))
                self._store.save(f"source-{number + 1}-{c}", out)
        self._together = list(sites.values())

    def _round_site(self, number: int, path: str, runs: list[Suspended], output: WeightsFile) -> _Site:
        """Round a layer, and those that share its input, for the inputs before which runs wait."""
        paths = next((site for site in self._together if site[0] == path), [path])
        waiting = {c: run.x for c, run in enumerate(runs) if run.path == path}
        heap.trim()
        threshold = self._threshold(paths, next(iter(waiting.values())))
        sums = _Sums()
        for c, x in waiting.items():
            rows = self._masked(x, threshold)
            part = sums.fitted if self._chunks[c].start < self._fitted else sums.held_out
            name = f"input-{number}-{c}-{path}"
            source = self._store.rows(name) if self._store.has(name) else None
            # where tokens went other ways, as to other experts, there is nothing to compare with
            part.add(rows, source if source is not None and source.size == x.size else rows)
        self._store.drop(f"input-{number}-*-{path}")
        heap.trim()
        solutions = self._solve(paths, sums)
        for one, solution in zip(paths, solutions, strict=True):
            for part_name in PARTS:
                output.write(f"{one}.{part_name}", getattr(solution, part_name))
        columns = [self._unpacked(*each) for each in zip(paths, solutions, strict=True)]
        w = np.concatenate(columns, axis=1) if many_rows.on_cpu() else mx.concatenate(columns, axis=1)
        return _Site(paths, threshold, w)

    def _threshold(self, paths: list[str], x: mx.array) -> float:
        """One for all layers of an input, from its first texts' decode steps."""
        steps = self._steps(x)
        if steps is None:
            return 0.0
        sizes = [self.layers[path].outputs for path in paths]
        share = np.average([masks.sparsity(path) for path in paths], weights=sizes)
        return masks.threshold(x[:, steps], float(share))

    def _steps(self, x: mx.array) -> slice | None:
        window = self._windows.shape[1]
        return masks.decode_rows(x, window, window // 2)

    def _masked(self, x: mx.array, threshold: float) -> Values:
        """x (..., inputs) with the small inputs of decode steps at zero."""
        steps = self._steps(x)
        return x if steps is None or not threshold else masked(x, steps, threshold)

    def _weight(self, path: str) -> Any:
        """The source's matrix (outputs, inputs), float32."""
        w = self._source.weight(path).astype(mx.float32)
        return w if on_device() else np.array(w, copy=False)

    def _solve(self, paths: list[str], sums: _Sums) -> list[gptq.Solution]:
        """The layers of an input, rounded."""
        layers = [self.layers[path] for path in paths]
        forms = [gptq.Form(one.bits, one.group_size, one.band, one["scales"].dtype) for one in layers]
        matrices = [self._weight(path) for path in paths]
        if sums.rows < FEWEST * layers[0].inputs:
            self.notes |= dict.fromkeys(paths, f"plainly rounded: the text gave it {sums.rows} rows")
            return [gptq.plain(*each) for each in zip(matrices, forms, strict=True)]
        targets = _targets(matrices, sums)
        del matrices
        solutions = gptq.solve(targets, forms, inputs_of(sums.hessian()))
        self.notes |= {path: one.note for path, one in zip(paths, solutions, strict=True) if one.note}
        return solutions

    def _unpacked(self, path: str, solution: gptq.Solution) -> Any:
        """(inputs, outputs) float32, of numpy on the CPU."""
        layer = self.layers[path]
        packed = (solution.weight, solution.scales.astype(mx.float32), solution.biases.astype(mx.float32))
        w = layout.dequantize(
            *packed, outputs=int(layer.outputs), bits=layer.bits, group_size=layer.group_size
        ).T
        mx.eval(w)
        return np.array(w, copy=False) if many_rows.on_cpu() else w

    def _products(self, site: _Site, x: mx.array) -> dict[str, mx.array]:
        """Path -> what each layer of a site makes of x."""
        y = times(self._masked(x, site.threshold), site.w)
        found, start = {}, 0
        for path in site.paths:
            layer = self.layers[path]
            part = y[..., start : start + layer.outputs]
            bias = layer.get("bias")
            found[path] = part if bias is None else part + bias.astype(y.dtype)
            start += layer.outputs
        return found


def _targets(matrices: list[Any], sums: _Sums) -> list[Any]:
    """Matrices (outputs, inputs) moved towards the source's outputs, if that is nearer on texts held out."""
    if not (sums.fitted.rows and sums.held_out.rows):
        return matrices
    fitted = inputs_of(*sums.fitted.sums(on_device()), alpha=ALPHA)
    if not fitted.are_finite:
        return matrices
    w = joined(matrices, 0)
    moved = fitted.moved(w)
    if not gained(w, moved - w, *sums.held_out.sums(on_device())) > 0:
        return matrices
    ends = itertools.accumulate(len(one) for one in matrices)
    return [moved[end - len(one) : end] for one, end in zip(matrices, ends, strict=True)]


def lines(notes: Mapping[str, str]) -> list[str]:
    """For people: why layers were rounded otherwise, with how many were."""
    by_reason: dict[str, list[str]] = {}
    for path, note in notes.items():
        by_reason.setdefault(note, []).append(path)
    return [f"{len(paths)} layers, {paths[0]} the first: {note}" for note, paths in by_reason.items()]
