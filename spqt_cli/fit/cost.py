"""How long a fit will take on this machine, from its arithmetic and a product that is timed now."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from spqt_cli.convert.source import Checkpoint
from spqt_cli.decode.bytes_read import BLOCK
from spqt_cli.fit.options import FitOptions
from spqt_cli.fit.text import TextOptions
from spqt_cli.measure import many_rows
from spqt_cli.measure.duration import speed, words

__all__ = ["of_options", "seconds", "words"]

# How much longer than at the timed product's speed, on SmolLM2-135M: two CPU cores (72c80f3; training at
# 1004eae), and an H200
PASSES = {"cpu": 2.4, "gpu": 3.5}  # two models over the text, with all that is no product
WRITING = {"cpu": 3.0, "gpu": 5.0}  # one token of every text at a time
SOLVING = 6.0  # factors, and rounding channel by channel
TRAINING = {"cpu": 1.45, "gpu": 3.0}  # steps of the training
# What a GPU waits for its host, in seconds, on an H200: Gemma-3-270M, Qwen2.5-Coder-1.5B and 8B shapes
HOST_ROUNDING = 3e-12  # each fitted weight and token
HOST_WRITING = 2.5e-4  # each layer and step
HOST_TRAINING = 0.01  # each layer and step
REST, PROCESS = 1 << 30, 300 << 20  # bytes besides blocks, and of a process that has no model yet
WRITTEN = 512  # steps of writing: all texts take them together


class Sized(Protocol):
    """What is asked of a layer: as of a ZigzagLinear."""

    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...


def source_bytes(checkpoint: Checkpoint) -> int:
    """Of a source's weights in memory."""
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return stored * 2 if many_rows.on_cpu() else stored  # float32


def memory(layers: Mapping[str, Sized], source: int, options: FitOptions) -> int:
    """The bytes that a fit with these options, settled, takes at its peak, about.

    layers: by path. source: bytes of the source's weights while it writes text, beside the keys and values of
    all texts; after it 1 GB and four blocks in 16 bits are enough (benchmarks.memory measures that).
    """
    blocks, cached = Counter[str](), 0
    for path, layer in layers.items():
        found = BLOCK.search(path)
        blocks[path[: found.end()] if found else ""] += 2 * layer.inputs * layer.outputs
        cached += layer.outputs if path.endswith((".k_proj", ".v_proj")) else 0
    rounding = REST + 4 * max(blocks.values(), default=0)
    writing = source + 4 * (options.own or 0) * options.window * cached + PROCESS
    return max(rounding, writing if options.own else 0)


def of_options(layers: Iterable[Sized], weights: int, options: FitOptions) -> float:
    """As `seconds`, of a fit with these options, settled, and text enough."""
    own = options.own or 0
    texts = own + (0 if options.data is None else TextOptions().most)
    return seconds(
        layers,
        weights,
        own=own * options.window,
        rounded_on=min(texts, options.rounded_on or 0) * options.window,
        steps=(options.steps or 0) if options.method == "full" else 0,
        batch=(options.batch or 0) * options.window,
    )


def seconds(
    layers: Iterable[Sized], weights: int, own: int, rounded_on: int, steps: int, batch: int
) -> float:
    """The expected time, give or take a half.

    weights: of the whole model. own: tokens that the source writes. rounded_on: tokens that both models
    pass. steps: of the training, of `batch` tokens each.
    """
    shapes = [(layer.inputs, layer.outputs) for layer in layers]
    passing = sum(2 * 2 * i * o for i, o in shapes) * rounded_on
    summing = sum(3 * i * i for i, _ in shapes) * rounded_on / 2  # layers share inputs
    solving = sum(i * i * (i / 3 + o) for i, o in shapes)
    fitted = sum(i * o for i, o in shapes)
    each = 8 * fitted + 6 * (weights - fitted)  # blocks run twice forwards, once backwards
    kind = "cpu" if many_rows.on_cpu() else "gpu"
    operations = PASSES[kind] * (passing + summing) + WRITING[kind] * 2 * weights * own + SOLVING * solving
    operations += TRAINING[kind] * each * steps * batch
    waiting = 0.0
    if not many_rows.on_cpu():
        waiting = HOST_ROUNDING * fitted * rounded_on + len(shapes) * (
            HOST_TRAINING * steps + HOST_WRITING * WRITTEN
        )
    return operations / speed() + waiting
