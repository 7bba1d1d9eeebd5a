"""Ways to compute all Zigzag products of a network, each of which keeps what it gave; for check_decode.py."""

from typing import Any

import mlx.core as mx

from spqt_cli.backends import select
from spqt_cli.decode import phase
from spqt_cli.format import layout

ALMOST_ZERO = mx.array([1e-30])
RECORD_EVERY = 32  # steps between those whose launches are held against float64


class Run:
    """One way to compute all Zigzag products of a network; keeps what each step gave.

    rows: per step, log-probabilities (vocabulary,) float32; skipped: per step, (channels of all launches,)
    bool. With keep also masks, per step, launch and projection, and at times a launch's inputs.
    """

    def __init__(self, path: Any, *, keep: bool = False) -> None:
        self.path, self.keep = path, keep
        self.rows: list[mx.array] = []
        self.skipped: list[mx.array] = []
        self.masks: list[list[list[mx.array]]] = []
        self.launches: list[tuple[mx.array, Any]] = []
        self.now: list[list[mx.array]] = []  # the masks of the step under way

    def __call__(self, x: mx.array, layers: Any) -> Any:
        self.now.append([skipped(x, layer) for layer in layers])
        if self.keep and len(self.rows) % RECORD_EVERY == 0:
            self.launches.append((x, layers))
        return self.path(x, layers)

    def step(self, network: Any, token: int, cache: list) -> None:
        """One token through the network; starts the evaluation without waiting for it."""
        under_way[:] = [self]
        self.now = []
        with phase.decoding():
            logits = network(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        self.rows.append(logits - mx.logsumexp(logits))
        self.skipped.append(mx.concatenate([mask for launch in self.now for mask in launch]))
        if self.keep:
            self.masks.append(self.now)
        mx.async_eval(self.rows[-1], self.skipped[-1], self.now if self.keep else [])


under_way: list[Run] = []  # the run whose step the network computes


def intercept() -> Any:
    """Sends the products of networks loaded later through `under_way`; returns the kernels' own path.

    Each step counts on from the one before, as in `spqt generate`.
    """
    native = select.prepare
    # Else several products would be one call, with no masks to see.
    select.prepare_gated = select.prepare_head = select.prepare_tail = lambda *_: None
    select.prepare = lambda layers: lambda x, _: under_way[0](x, layers)
    steps: dict[tuple[int, ...], list[Any]] = {}

    def path(x: mx.array, layers: Any) -> Any:
        key = tuple(map(id, layers))
        if key not in steps:  # the layers are kept alive: their ids are the key
            steps[key] = [native(layers), mx.zeros(len(layers), mx.uint32), layers]
        step, before, _ = steps[key]
        outputs, steps[key][1] = step(x, before)
        return outputs, steps[key][1] - before

    return path


def skipped(x: mx.array, layer: Any) -> mx.array:
    """(inputs,) bool: where a launch skips a channel of x."""
    if layer.threshold is None:
        return mx.zeros(x.size, mx.bool_)
    return layout.inactive(x, layer.threshold).reshape(-1)


def masked(x: mx.array, layer: Any) -> mx.array:
    return x if layer.threshold is None else layout.mask(x, layer.threshold)


class Forced(Run):
    """The kernels on the masks of another run, in the order in which they were met."""

    def __init__(self, path: Any, given: Run) -> None:
        super().__init__(path)
        self.given = given
        self.kept: dict[int, Kept] = {}

    def __call__(self, x: mx.array, layers: Any) -> Any:
        masks = self.given.masks[len(self.rows)][len(self.now)]
        self.now.append(masks)
        outputs = []
        for layer, mask in zip(layers, masks, strict=True):
            kept = mx.where(mask.reshape(x.shape), mx.array(0, x.dtype), x)
            (y,), _ = self.path(kept, [self.kept.setdefault(id(layer), Kept(layer))])
            outputs.append(y)
        return outputs, mx.zeros(len(layers), mx.uint32)


class Kept:
    """A layer that skips exact zeros alone: what the kernels see when the masks are given."""

    threshold = ALMOST_ZERO

    def __init__(self, layer: Any) -> None:
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.layer, name, value)

    def __getitem__(self, name: Any) -> Any:
        return self.layer[name]


def dequantized(x: mx.array, layers: Any) -> Any:
    """The masked input times dequantized weights, in the scales' dtype."""
    outputs = []
    for layer in layers:
        y = masked(x, layer) @ layer.dequantized().T
        outputs.append(y if layer.get("bias") is None else y + layer.bias)
    return outputs, mx.zeros(len(layers), mx.uint32)


def exact(x: mx.array, layers: Any) -> Any:
    """The definition in float32, rounded to x's dtype once."""
    outputs = []
    for layer in layers:
        y = masked(x, layer).astype(mx.float32) @ float32_weights(layer)
        y = y if layer.get("bias") is None else y + layer.bias.astype(mx.float32)
        outputs.append(y.astype(x.dtype))
    return outputs, mx.zeros(len(layers), mx.uint32)


def float32_weights(layer: Any) -> mx.array:
    """(inputs, outputs) float32, made once a layer: four bytes a weight."""
    made = layer.__dict__
    if "_float32_weights" not in made:
        scales, biases = layer.scales.astype(mx.float32), layer["biases"].astype(mx.float32)
        how = {"outputs": layer.outputs, "bits": layer.bits, "group_size": layer.group_size}
        made["_float32_weights"] = mx.contiguous(layout.dequantize(layer.weight, scales, biases, **how).T)
        mx.eval(made["_float32_weights"])
    return made["_float32_weights"]
