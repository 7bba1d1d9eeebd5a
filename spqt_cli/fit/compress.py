"""Error-compensating rounding of a whole model, one block of weights in memory at a time.

Two models pass over the text block by block: the source, and the compressed model as far as it is done, with
channels skipped at decode positions. Layers that share an input are rounded together, for the inputs that
they will see, before the next ones' inputs are computed. The states between blocks lie on disk, so that a run
that was stopped goes on at its block.

Source: GPTQ (arXiv 2210.17323) in order of the Hessian's diagonal; targets from the source's own inputs as in
GPTAQ (arXiv 2504.02692), of which a part is taken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.calibrate.stream.blocks import Block, Blocks
from spqt_cli.convert.journal import Journal
from spqt_cli.decode.layers import ZigzagLinear, zigzag_layers
from spqt_cli.decode.session import Loaded
from spqt_cli.fit import gptq, masks
from spqt_cli.fit.hessian import Inputs
from spqt_cli.fit.products import Gram, times
from spqt_cli.fit.source_blocks import SourceBlocks
from spqt_cli.fit.store import Store
from spqt_cli.fit.weights_file import WeightsFile
from spqt_cli.format import layout
from spqt_cli.measure import many_rows, probes

ALPHA = 0.25  # of the way from the compressed model's target to the source's
HELD_OUT = 8  # one text of so many decides whether that way is worth going
CHUNK_BYTES = {"cpu": 128 << 20, "gpu": 1 << 30}  # of activations in a block, that texts passing together take
FEWEST = 0.25  # rows for each input of a layer: one that saw fewer keeps its rounding

OnProgress = Callable[[float, float, str], None]
PARTS = ("weight", "scales", "biases")


class _Enough(Exception):
    """What this pass is for has been seen."""


class _Tap(nn.Module):
    """Stands in a Zigzag layer's place and hands its input on."""

    def __init__(self, path: str, ask: Callable[[str, mx.array], mx.array]) -> None:
        super().__init__()
        self._path, self._ask = path, ask

    def __call__(self, x: mx.array) -> mx.array:
        return self._ask(self._path, x)


@dataclass
class _Layer:
    """A layer of the current block. threshold: on |x| at decode positions; w: (inputs, outputs), rounded."""

    threshold: float = 0.0
    w: Any = None


@dataclass
class _Sums:
    """Sums over texts at one input: X^T X and (S - X)^T X, of those to fit on and of those held out."""

    fitted: Gram = field(default_factory=Gram)
    held_out: Gram = field(default_factory=Gram)

    @property
    def rows(self) -> int:
        return self.fitted.rows + self.held_out.rows

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Both sums over all texts."""
        (a, b), (c, d) = self.fitted.host(), self.held_out.host() if self.held_out.rows else (0, 0)
        return a + c, b + d


class Compression:
    """The pass over all blocks; `run` it once."""

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
        self.layers: dict[str, ZigzagLinear] = zigzag_layers(rounded.model)
        self.notes: dict[str, str] = {}
        taps = [(path, _Tap(path, self._ask)) for path in self.layers]
        rounded.model.update_modules(tree_unflatten(taps))
        self._walk = Blocks(rounded.model, self.layers, rounded.folder.path)
        self.blocks = self._walk.blocks(windows.shape[1])
        self._chunks = self._cut()
        self._asked: Callable[[str, mx.array], mx.array] = self._unquantized
        self._now: dict[str, _Layer] = {}

    def _cut(self) -> list[slice]:
        """Texts that pass together; those held out are chunks of their own, at the end."""
        count, window = self._windows.shape
        widest = max(max(layer.inputs, layer.outputs) for layer in self.layers.values())
        narrowest = min(min(layer.inputs, layer.outputs) for layer in self.layers.values())
        room = CHUNK_BYTES["cpu" if many_rows.on_cpu() else "gpu"]
        size = max(1, room // (4 * window * (3 * widest + 4 * narrowest)))
        self._fitted = count - (count // HELD_OUT or (count > 1))
        cuts = sorted({*range(0, self._fitted, size), *range(self._fitted, count, size), count})
        return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]

    def run(self, output: WeightsFile, journal: Journal) -> None:
        """Round every block that the journal does not have yet, into `output`."""
        done = self._resume(output, journal)
        with many_rows.many_rows(heads=False):
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
            self._store.save(f"source-0-{c}", self._source.walk.embedded(self._windows[texts]))
            self._store.save(f"x-0-{c}", self._walk.embedded(self._windows[texts]))

    def _round(self, number: int, block: Block, output: WeightsFile) -> dict[str, str]:
        """Round a block's layers; tensor -> SHA-256 of what was written."""
        self._now = {}
        theirs = self._source.blocks[number]
        self._source.fill(theirs)
        written: dict[str, str] = {}
        for site in self._pass_source(number, theirs):
            sums = self._pass_to(number, block, site)
            inputs = self._inputs(site, sums)
            for path in site:
                solution = self._solve(path, inputs, sums.rows)
                for part in PARTS:
                    output.write(f"{path}.{part}", getattr(solution, part))
                    written[f"{path}.{part}"] = output.sha256(f"{path}.{part}")
                self._now[path].w = self._unpacked(path, solution)
        for path in block.paths:
            if path not in self._now:
                self.notes[path] = "plainly rounded: the text never reached it"
        self._source.drop(theirs)
        self._asked = self._known
        for c in range(len(self._chunks)):
            self._store.save(f"x-{number + 1}-{c}", block.run(self._store.load(f"x-{number}-{c}")))
        return written

    def _pass_source(self, number: int, block: Block) -> list[list[str]]:
        """Run the source's block; the paths of its layers, together where they share an input."""
        sites: list[list[str]] = []
        seen: set[str] = set()
        last: mx.array | None = None
        c = 0

        def watch(module: nn.Module, call: Any, x: mx.array) -> mx.array:
            nonlocal last
            path = paths[id(module)]
            if x is not last and path not in seen:
                sites.append([path])
                self._store.save(f"input-{number}-{c}-{path}", x, short=True)
            elif path not in seen:
                sites[-1].append(path)
            seen.add(path)
            last = x
            return call(module, x)

        paths = {id(self._source.modules[path]): path for path in block.paths}
        with probes.hooked([self._source.modules[path] for path in block.paths], watch):
            order: list[list[str]] = []
            for c in range(len(self._chunks)):
                sites, last = [], None
                seen.clear()
                self._store.save(
                    f"source-{number + 1}-{c}", block.run(self._store.load(f"source-{number}-{c}"))
                )
                order = order or sites
        return order

    def _pass_to(self, number: int, block: Block, site: list[str]) -> _Sums:
        """Run the compressed block up to what the layers of a site share, for all texts; its sums."""
        sums = _Sums()
        c = 0

        def look(path: str, x: mx.array) -> mx.array:
            if path not in site:
                return self._known(path, x)
            self._choose_thresholds(site, x)
            part = sums.fitted if self._chunks[c].start < self._fitted else sums.held_out
            rows, source = self._mask(path, x), self._store.load(f"input-{number}-{c}-{site[0]}")
            # where tokens went other ways, as to other experts, there is nothing to compare with
            part.add(rows, source.reshape(rows.shape) if source.size == x.size else rows)
            raise _Enough

        self._asked = look
        for c in range(len(self._chunks)):
            try:
                block.run(self._store.load(f"x-{number}-{c}"))
            except _Enough:
                continue
        self._store.drop(f"input-{number}-*-{site[0]}")
        return sums

    def _choose_thresholds(self, site: list[str], x: mx.array) -> None:
        """Of layers that have none yet: from the first texts' decode steps."""
        steps = masks.decode_rows(x, self._windows.shape[1])
        values = None if steps is None else np.array(x[:, steps].astype(mx.float32), copy=False)
        for path in site:
            if path not in self._now:
                found = 0.0 if values is None else masks.threshold(values, masks.sparsity(path))
                self._now[path] = _Layer(found)

    def _mask(self, path: str, x: mx.array) -> mx.array:
        """x (..., inputs) with the inputs of decode steps that a layer skips at zero."""
        steps, threshold = masks.decode_rows(x, self._windows.shape[1]), self._now[path].threshold
        if steps is None or not threshold:
            return x
        masked = layout.mask(x[:, steps], mx.array([threshold], mx.float32))
        return mx.concatenate([x[:, : steps.start], masked], axis=1)

    def _weight(self, path: str) -> np.ndarray:
        """The source's matrix (outputs, inputs), float32."""
        return np.array(self._source.weight(path).astype(mx.float32), copy=False)

    def _inputs(self, site: list[str], sums: _Sums) -> Inputs:
        """What to round a site's layers for, the target moved if that comes out nearer on texts held out."""
        hessian, cross = sums.joined()
        if not sums.held_out.rows:
            return Inputs(hessian)
        fitted = Inputs(*sums.fitted.host(), alpha=ALPHA)
        other, difference = sums.held_out.host()
        gained = 0.0
        if fitted.are_finite:
            for path in site:
                w = self._weight(path)
                change = fitted.moved(w) - w
                gained += ((2 * (w @ difference) - change @ other) * change).sum(dtype=np.float64)
        return Inputs(hessian, cross, alpha=ALPHA if gained > 0 else 0.0)

    def _solve(self, path: str, inputs: Inputs, rows: int) -> gptq.Solution:
        layer = self.layers[path]
        form: dict[str, Any] = {
            "bits": layer.bits,
            "group_size": layer.group_size,
            "band": layer.band,
            "dtype": layer["scales"].dtype,
        }
        if rows < FEWEST * layer.inputs:
            self.notes[path] = f"plainly rounded: the text gave it {rows} rows"
            return gptq.plain(self._weight(path), **form)
        solution = gptq.solve_shared(self._weight(path), inputs, **form)
        if solution.note:
            self.notes[path] = solution.note
        return solution

    def _unpacked(self, path: str, solution: gptq.Solution) -> Any:
        layer = self.layers[path]
        packed = [getattr(solution, part) for part in PARTS]
        packed[1:] = [part.astype(mx.float32) for part in packed[1:]]
        w = layout.dequantize(
            *packed, outputs=layer.outputs, bits=layer.bits, group_size=layer.group_size
        ).T
        mx.eval(w)
        return np.ascontiguousarray(np.array(w, copy=False)) if many_rows.on_cpu() else w

    def _ask(self, path: str, x: mx.array) -> mx.array:
        return self._asked(path, x)

    def _known(self, path: str, x: mx.array) -> mx.array:
        """What the rounded layer makes of x; one that is not rounded yet, what the source's makes of it."""
        if path not in self._now or self._now[path].w is None:
            return self._unquantized(path, x)
        y = times(self._mask(path, x), self._now[path].w)
        bias = self.layers[path].get("bias")
        return y if bias is None else y + bias.astype(y.dtype)

    def _unquantized(self, path: str, x: mx.array) -> mx.array:
        found: mx.array = self._source.modules[path](x)
        return found


def linked(notes: Mapping[str, str]) -> list[str]:
    """Lines for people: why layers kept their rounding, with how many did."""
    by_reason: dict[str, list[str]] = {}
    for path, note in notes.items():
        by_reason.setdefault(note, []).append(path)
    return [f"{len(paths)} layers {note}: {paths[0]} ..." for note, paths in by_reason.items()]
