"""A converted model whose groups and norms can be moved: passes of its blocks with masks on, and slopes.

One block's weights are unpacked at a time, for as long as it is worked on; packed ones and codes are held
where all of them are small. It knows no optimizer and no files but the model's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.calibrate.gradients import gradient_errors
from spqt_cli.calibrate.stream.blocks import Block, Blocks, weights_bytes
from spqt_cli.decode.layers import ZigzagLinear, linear_layers
from spqt_cli.decode.session import Loaded
from spqt_cli.fit import masks, products
from spqt_cli.fit.affine import LEAST_SPREAD, Groups
from spqt_cli.measure import many_rows
from spqt_cli.measure.many_rows import from_host, host

HELD_BYTES = {"cpu": 256 << 20, "gpu": 16 << 30}  # of packed weights: models above are read block by block
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 1 << 30}  # of a layer's activations: texts that pass together

KEPT_BYTES = {"cpu": 192 << 20, "gpu": 8 << 30}  # of products that need not be computed again
PROMPTS = 4  # one token of so many is of a prompt
NOTHING: Mapping[str, float] = {}
Taking = Callable[[str, mx.array, mx.array], None]

FACTOR, OFFSET = "factor", "offset"


class _Layer(nn.Module):
    """Stands in a Zigzag layer's place: its products are the student's."""

    def __init__(self, path: str, student: "Student") -> None:
        super().__init__()
        self._path, self._student = path, student

    def __call__(self, x: mx.array) -> mx.array:
        return self._student.product(self._path, x)


class Student:
    """The model. values: name -> what is trained, of each block's layers and norms; set from outside.

    prompt: tokens of a text before decode steps. thresholds: path -> on |x|, of layers that skip in these;
    one left out is dense.
    rounded_to: tensor -> dtype that scales and biases are rounded to; one left out is not.
    """

    def __init__(self, loaded: Loaded, window: int) -> None:
        """loaded: lazily. window: tokens of a text, even."""
        self.window, self.prompt = window, window // PROMPTS
        self.layers: dict[str, ZigzagLinear] = linear_layers(loaded.model)
        loaded.model.update_modules(tree_unflatten([(path, _Layer(path, self)) for path in self.layers]))
        self.walk = Blocks(loaded.model, self.layers, loaded.folder.path)
        self.blocks: list[Block] = self.walk.blocks(window)
        self.norms = [_norms(block.module, block.name) for block in self.blocks]
        inside = tuple(f"{block.name}." for block in self.blocks)
        self.last_norms = {
            name: module for name, module in _norms(loaded.model, "").items() if not name.startswith(inside)
        }
        self._kind = "cpu" if many_rows.on_cpu() else "gpu"
        self._holds = weights_bytes(loaded.folder.path) <= HELD_BYTES[self._kind]
        self._groups: dict[str, Groups] = {}
        self._weights: dict[str, Any] = {}  # of the block at hand, unpacked
        self._kept: dict[tuple[int, int, str], list[Any]] = {}  # products by block, first text and path
        self._keeping: frozenset[str] = frozenset()
        self._place = (0, 0)  # the block and the first text at hand
        self._slopes: dict[str, Any] | None = None
        self._settling: Mapping[str, float] = {}
        self._taking: Taking | None = None
        self.thresholds: dict[str, float] = {}
        self.values: dict[str, mx.array] = {}
        self.rounded_to: Mapping[str, mx.Dtype] = {}

    def start(self, number: int) -> dict[str, mx.array]:
        """The values of a block that leave it as it is."""
        found: dict[str, mx.array] = {}
        for path in self.blocks[number].paths:
            shape = self.layers[path]["scales"].shape
            found |= {f"{path}.{FACTOR}": mx.zeros(shape), f"{path}.{OFFSET}": mx.zeros(shape)}
        return found | _weights_of(self.norms[number])

    def start_of_last_norms(self) -> dict[str, mx.array]:
        """The values of norms behind the blocks that leave them as they are."""
        return _weights_of(self.last_norms)

    def chunks(self, texts: int) -> list[slice]:
        """Which of so many texts pass a block together."""
        widest = max(max(layer.inputs, layer.outputs) for layer in self.layers.values())
        size = max(1, CHUNK_BYTES[self._kind] // (4 * self.window * widest))
        return [slice(i, i + size) for i in range(0, texts, size)]

    def embedded(self, tokens: np.ndarray) -> mx.array:
        """What enters the first block, float32, for tokens (texts, window)."""
        h = self.walk.embedded(tokens).astype(mx.float32)
        mx.eval(h)
        return h

    def forward(
        self, number: int, h: mx.array, *, settle: Mapping[str, float] = NOTHING, keep: bool = False
    ) -> mx.array:
        """States (texts, window, width) after a block.

        settle: path -> the share of inputs for which a layer's threshold is set on the way, from these texts.
        keep: `backward` will be called for the same texts.
        """
        self._settling = settle
        self._keeping = self._worth_keeping(len(h)) if keep else frozenset()
        out = []
        with self._at(number):
            for texts in [slice(0, len(h))] if settle else self.chunks(len(h)):
                self._place = (number, texts.start)
                out.append(self.blocks[number].run(h[texts]))
                mx.eval(out)
        self._keeping = frozenset()
        return mx.concatenate(out)

    def _worth_keeping(self, texts: int) -> frozenset[str]:
        """The layers whose products for so many texts save most work for their size, as many as fit."""
        left, found = KEPT_BYTES[self._kind], []
        for path in sorted(self.layers, key=lambda path: -self.layers[path].inputs):
            left -= 4 * texts * self.window * self.layers[path].outputs
            if left < 0:
                break
            found.append(path)
        return frozenset(found)

    def backward(self, number: int, h: mx.array, slope: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The slopes by a block's input h and by its values. slope: that by its output."""
        norms = self.norms[number]
        names = list(norms)

        def run(x: mx.array, *weights: mx.array) -> mx.array:
            _put(norms, dict(zip(names, weights, strict=True)))
            return self.blocks[number].run(x)

        by_input, by_norms = [], [mx.zeros_like(self.values[name]) for name in names]
        self._slopes = {}
        with self._at(number), gradient_errors("training does", "use --fit gptq"):
            for texts in self.chunks(len(h)):
                self._place = (number, texts.start)
                primals = [h[texts], *(self.values[name] for name in names)]
                _, (found, *others) = mx.vjp(run, primals, [slope[texts]])
                by_norms = [a + b for a, b in zip(by_norms, others, strict=True)]
                by_input.append(found)
                mx.eval(found, by_norms, [a for a in self._slopes.values() if isinstance(a, mx.array)])
        slopes = {name: mx.array(a) for name, a in self._slopes.items()}
        self._slopes = None
        return mx.concatenate(by_input), slopes | dict(zip(names, by_norms, strict=True))

    def take_inputs(self, number: int, h: mx.array, slope: mx.array, take: Taking) -> mx.array:
        """The slope by a block's input h (1, window, width); take: called with each layer's path, input and
        the slope by it, (rows, inputs) both. slope: that by the block's output.
        """
        self._taking = take
        try:
            with self._at(number), gradient_errors("training does", "use --fit gptq"):
                self._place = (number, 0)
                _, (found,) = mx.vjp(self.blocks[number].run, [h], [slope])
                mx.eval(found)
        finally:
            self._taking = None
        return found

    def head(self, tokens: np.ndarray) -> Any:
        """A `predictions.Head` for tokens (1, window); the weights of `last_norms` come after its slice."""

        def logits(h: mx.array, rows: slice, *weights: mx.array) -> mx.array:
            if weights:
                _put(self.last_norms, dict(zip(self.last_norms, weights, strict=True)))
            return self.walk.logits(tokens[:, rows], h)

        return logits

    @contextmanager
    def _at(self, number: int) -> Iterator[None]:
        """The block's weights are there, and products go through BLAS."""
        _put(self.norms[number], self.values)
        try:
            with many_rows.many_rows(heads=False):
                yield
        finally:
            _put(self.norms[number], self.values)
            self._weights.clear()
            if not self._holds:
                self._groups.clear()
                self.walk.drop(number)

    def settle_last_norms(self) -> None:
        """Let norms behind the blocks have their values."""
        _put(self.last_norms, self.values)  # of which a block has none

    def product(self, path: str, x: mx.array) -> mx.array:
        """What a layer makes of its input x (..., inputs)."""
        layer = self.layers[path]
        x = self._masked(path, x)
        rows = self._multiplied(path, x.reshape(-1, x.shape[-1]))
        y = rows.reshape(*x.shape[:-1], layer.outputs).astype(x.dtype)
        bias = layer.get("bias")
        return y if bias is None else y + bias

    def _masked(self, path: str, x: mx.array) -> mx.array:
        steps = masks.decode_rows(x, self.window, self.prompt)
        if steps is not None and path in self._settling:
            self.thresholds[path] = masks.threshold(x[:, steps], self._settling[path])
        threshold = self.thresholds.get(path, 0.0)
        return x if steps is None or not threshold else _masked(x, steps, threshold)

    def _multiplied(self, path: str, rows: mx.array) -> mx.array:
        """rows (n, inputs) times a layer's matrix; the slopes by its groups are added on the way back."""
        layer = self.layers[path]
        outputs, size = layer.outputs, layer.group_size

        @mx.custom_function
        def forward(x: mx.array) -> mx.array:
            kept = self._kept.get((*self._place, path)) if self._slopes is not None else None
            if kept:
                return kept.pop(0)
            y = _native(x) @ self._weight(path)  # (bands, rows, band)
            y = from_host(y.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :outputs])
            if path in self._keeping:
                self._kept.setdefault((*self._place, path), []).append(y)
            return y

        @forward.vjp
        def backward(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            w = self._weight(path)  # (bands, inputs, band)
            bands, inputs, band = w.shape
            if missing := bands * band - outputs:
                cotangent = mx.pad(cotangent, [(0, 0), (0, missing)])
            dy, left = _native(cotangent).reshape(-1, bands, band), _native(x).T
            dx: Any = None
            for b in range(bands):
                part = dy[:, b]
                dx = part @ w[b].T if dx is None else dx + part @ w[b].T
                if self._slopes is None:
                    continue
                slopes = (left @ part).reshape(inputs, -1, size)
                dots = _dots(slopes, w[b].reshape(inputs, -1, size))
                self._add(path, b, bands, slopes.sum(-1), dots)
            if self._taking is not None:
                self._taking(path, x, from_host(dx))
            return from_host(dx)

        return cast(mx.array, forward(rows))

    def _add(self, path: str, band: int, bands: int, sums: Any, dots: Any) -> None:
        """Note the slopes of a band's groups: sums of those by its values, and their products with these."""
        assert self._slopes is not None
        factor, offset = (_native(self.values[f"{path}.{kind}"][band]) for kind in (FACTOR, OFFSET))
        by_offset = _native(self._moved_from(path).spread[band]) * sums
        by_factor = (dots - offset * by_offset) / (1 + factor)
        for kind, found in ((FACTOR, by_factor), (OFFSET, by_offset)):
            whole = self._slopes.setdefault(f"{path}.{kind}", np.zeros((bands, *found.shape), np.float32))
            whole[band] += np.array(found, copy=False)

    def _weight(self, path: str) -> Any:
        """A layer's matrix (bands, inputs, band) float32 with its groups moved, of numpy on the CPU."""
        if path not in self._weights:
            scales, biases = self.affine(path)
            self._weights[path] = self._unpacked(path, scales, biases)
        return self._weights[path]

    def affine(self, path: str) -> tuple[mx.array, mx.array]:
        """Scales and biases (bands, inputs, groups) float32 of a layer."""
        named = (self.values[f"{path}.{kind}"] for kind in (FACTOR, OFFSET))
        scales, biases = self._moved_from(path).moved(*named)
        dtype = self.rounded_to.get(f"{path}.scales", mx.float32)
        return scales.astype(dtype).astype(mx.float32), biases.astype(dtype).astype(mx.float32)

    def _unpacked(self, path: str, scales: mx.array, biases: mx.array) -> Any:
        layer = self.layers[path]
        return products.unpacked(layer.weight, scales, biases, layer.bits, layer.group_size)

    def _moved_from(self, path: str) -> Groups:
        if path not in self._groups:
            layer = self.layers[path]
            scales, biases = (layer[part].astype(mx.float32) for part in ("scales", "biases"))
            w = mx.array(self._unpacked(path, scales, biases)).reshape(*scales.shape, layer.group_size)
            spread = mx.maximum(mx.sqrt(mx.var(w, axis=-1, ddof=1)), LEAST_SPREAD)
            mx.eval(scales, biases, spread)
            self._groups[path] = Groups(scales, biases, spread)
        return self._groups[path]


def _native(a: mx.array) -> Any:
    """a in float32, as numpy on the CPU."""
    return host(a) if many_rows.on_cpu() else a.astype(mx.float32)


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


def _dots(a: Any, b: Any) -> Any:
    """Products of the last axes."""
    return np.vecdot(a, b) if isinstance(a, np.ndarray) else (a * b).sum(-1)


def _norms(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Name of the weight -> module, for each norm that has one."""
    found = {}
    for path, inner in module.named_modules():
        weight = inner.get("weight")
        if "Norm" in type(inner).__name__ and isinstance(weight, mx.array) and weight.ndim == 1:
            found[".".join(filter(None, (prefix, path, "weight")))] = inner
    return found


def _weights_of(norms: Mapping[str, nn.Module]) -> dict[str, mx.array]:
    return {name: module["weight"].astype(mx.float32) for name, module in norms.items()}


def _put(norms: Mapping[str, nn.Module], values: Mapping[str, mx.array]) -> None:
    for name, module in norms.items():
        if name in values:
            module["weight"] = values[name]
