"""The blocks of a student as one thread passes texts through them, with masks on, and slopes.

Several lanes share matrices; norms and whatever else a block has are each one's own, for they are put into
the modules while a gradient is taken.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.calibrate.gradients import gradient_errors
from spqt_cli.calibrate.stream.blocks import Block, Blocks
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.decode.session import Loaded
from spqt_cli.fit import masks, products
from spqt_cli.fit.matrices import Matrices, native
from spqt_cli.measure import many_rows
from spqt_cli.measure.many_rows import from_host, host

PROMPTS = 4  # one token of so many is of a prompt
Taking = Callable[[str, mx.array, mx.array], None]
Slopes = dict[str, Any]


class _Layer(nn.Module):
    """Stands in a Zigzag layer's place: its products are the lane's."""

    def __init__(self, path: str, lane: "Lane") -> None:
        super().__init__()
        self._path, self._lane = path, lane

    def __call__(self, x: mx.array) -> mx.array:
        return self._lane.product(self._path, x)


class Lane:
    """A model's blocks. Whatever is computed here belongs to the thread that made it.

    thresholds: path -> on |x|, of layers that skip in decode steps; one left out is dense.
    settling: path -> the share of inputs for which a threshold is set in passes from now on.
    keeping: layers whose products `backward` will ask for again. threads: its part of the CPU's, beside
    other lanes; None: all.
    """

    def __init__(
        self, loaded: Loaded, layers: Mapping[str, ZigzagLinear], window: int, matrices: Matrices
    ) -> None:
        """loaded: lazily. layers: its own. window: tokens of a text, even."""
        self._window, self._prompt, self._matrices = window, window // PROMPTS, matrices
        loaded.model.update_modules(tree_unflatten([(path, _Layer(path, self)) for path in layers]))
        self.walk = Blocks(loaded.model, layers, loaded.folder.path)
        self.blocks: list[Block] = self.walk.blocks(window)
        self.norms = [norms(block.module, block.name) for block in self.blocks]
        self.thresholds: dict[str, float] = {}
        self.settling: Mapping[str, float] = {}
        self.keeping: frozenset[str] = frozenset()
        self.threads: int | None = None
        self._kept: dict[tuple[int, int, str], list[Any]] = {}  # products by block, first text and path
        self._place = (0, 0)  # the block and the first text at hand
        self._slopes: Slopes | None = None
        self._taking: Taking | None = None

    def enter(self, number: int, values: Mapping[str, mx.array]) -> None:
        """Let a block's norms have their values."""
        put(self.norms[number], values)

    def forward(self, number: int, texts: slice, h: mx.array) -> mx.array:
        """Some texts' states after a block, computed. h: all texts' before it (texts, window, width), too."""
        self._place = (number, texts.start)
        out = self.blocks[number].run(h[texts])
        mx.eval(out)
        return out

    def backward(
        self, number: int, texts: slice, h: mx.array, slope: mx.array, by: Mapping[str, mx.array]
    ) -> tuple[mx.array, Slopes]:
        """Of some texts the slopes by a block's input, and by its values: by its groups and by its norms'
        weights, which are in `by`. h, slope: of all texts, computed; slope: that by the block's output.
        """
        names = list(self.norms[number])

        def run(x: mx.array, *weights: mx.array) -> mx.array:
            put(self.norms[number], dict(zip(names, weights, strict=True)))
            return self.blocks[number].run(x)

        self._place, self._slopes = (number, texts.start), {}
        try:
            primals = [h[texts], *(by[name] for name in names)]
            with gradient_errors("training does", "use --fit gptq"):
                _, (found, *others) = mx.vjp(run, primals, [slope[texts]])
                mx.eval(found, others)
            return found, self._slopes | dict(zip(names, others, strict=True))
        finally:
            self._slopes = None
            put(self.norms[number], by)

    def take_inputs(self, number: int, h: mx.array, slope: mx.array, take: Taking) -> mx.array:
        """The slope by a block's input h (1, window, width); take: called with each layer's path, input and
        the slope by it, (rows, inputs) both. slope: that by the block's output.
        """
        self._place, self._taking = (number, 0), take
        try:
            with gradient_errors("training does", "use --fit gptq"):
                _, (found,) = mx.vjp(self.blocks[number].run, [h], [slope])
                mx.eval(found)
        finally:
            self._taking = None
        return found

    def product(self, path: str, x: mx.array) -> mx.array:
        """What a layer makes of its input x (..., inputs)."""
        layer = self._matrices.layers[path]
        x = self._masked(path, x)
        rows = self._multiplied(path, x.reshape(-1, x.shape[-1]))
        y = rows.reshape(*x.shape[:-1], layer.outputs).astype(x.dtype)
        bias = layer.get("bias")
        return y if bias is None else y + bias

    def _masked(self, path: str, x: mx.array) -> mx.array:
        steps = masks.decode_rows(x, self._window, self._prompt)
        if steps is not None and path in self.settling:
            self.thresholds[path] = masks.threshold(x[:, steps], self.settling[path])
        threshold = self.thresholds.get(path, 0.0)
        return x if steps is None or not threshold else _masked(x, steps, threshold)

    def _multiplied(self, path: str, rows: mx.array) -> mx.array:
        """rows (n, inputs) times a layer's matrix; the slopes by its groups are added on the way back."""
        layer, weight = self._matrices.layers[path], self._matrices.weight
        outputs, size = layer.outputs, layer.group_size

        @mx.custom_function
        def forward(x: mx.array) -> mx.array:
            kept = self._kept.get((*self._place, path)) if self._slopes is not None else None
            if kept:
                return kept.pop(0)
            bands = native(x) @ weight(path)  # (bands, rows, band)
            y = from_host(bands.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :outputs])
            if path in self.keeping:
                self._kept.setdefault((*self._place, path), []).append(y)
            return y

        @forward.vjp
        def backward(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            w = weight(path)  # (bands, inputs, band)
            if missing := w.shape[0] * w.shape[2] - outputs:
                cotangent = mx.pad(cotangent, [(0, 0), (0, missing)])
            dy, left = native(cotangent), native(x)
            if self._slopes is None:
                dx = products.slopes_by_inputs(dy, w)
            else:
                dx, *sums = products.slopes(dy, left, w, size, self.threads)
                by_group = self._matrices.slopes(path, *sums)
                if not many_rows.on_cpu():
                    mx.eval(dx, by_group)  # or all layers' products would wait in memory
                for kind, found in by_group.items():
                    name = f"{path}.{kind}"
                    self._slopes[name] = self._slopes.get(name, 0) + found
            if self._taking is not None:
                self._taking(path, x, from_host(dx))
            return from_host(dx)

        return cast(mx.array, forward(rows))


def _masked(x: mx.array, steps: slice, threshold: float) -> mx.array:
    """As `products.masked`, and with a gradient."""
    if not many_rows.on_cpu():
        return cast(mx.array, products.masked(x, steps, threshold))

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return from_host(products.masked(x, steps, threshold)).astype(x.dtype)

    @forward.vjp
    def backward(_: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        slope = np.array(cotangent)
        slope[:, steps] *= host(y[:, steps]) != 0
        return from_host(slope)

    return cast(mx.array, forward(x))


def norms(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Name of the weight -> module, for each norm that has one."""
    found = {}
    for path, inner in module.named_modules():
        weight = inner.get("weight")
        if "Norm" in type(inner).__name__ and isinstance(weight, mx.array) and weight.ndim == 1:
            found[".".join(filter(None, (prefix, path, "weight")))] = inner
    return found


def put(norms: Mapping[str, nn.Module], values: Mapping[str, mx.array]) -> None:
    """Let norms have their weights, of those that values names."""
    for name, module in norms.items():
        if name in values:
            module["weight"] = values[name]
