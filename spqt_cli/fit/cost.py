"""How long a fit will take on this machine, from its arithmetic and a product that is timed now."""

import time
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.measure import many_rows

# How much longer than at the timed product's speed, on SmolLM2-135M and two CPU cores
PASSES = 3.5  # two models over the text, with all that is no product
WRITING = 5.0  # one token of every text at a time
SOLVING = 6.0  # factors, and rounding channel by channel
TRAINING = 3.0  # steps of the training
TIMED = 0.2  # seconds
# What a GPU waits for its host, in seconds, on an H200: Gemma-3-270M, Qwen2.5-Coder-1.5B and 8B shapes
HOST_ROUNDING = 3e-12  # each fitted weight and token
HOST_WRITING = 2.5e-4  # each layer and step
HOST_TRAINING = 0.01  # each layer and step
WRITTEN = 512  # steps of writing: all texts take them together


def seconds(
    layers: Iterable[ZigzagLinear], weights: int, own: int, rounded_on: int, steps: int, batch: int
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
    operations = PASSES * (passing + summing) + WRITING * 2 * weights * own + SOLVING * solving
    operations += TRAINING * each * steps * batch
    waiting = 0.0
    if not many_rows.on_cpu():
        waiting = HOST_ROUNDING * fitted * rounded_on + len(shapes) * (
            HOST_TRAINING * steps + HOST_WRITING * WRITTEN
        )
    return operations / speed() + waiting


def speed() -> float:
    """Float32 operations per second in a product of many rows."""
    x, w = np.ones((2048, 1024), np.float32), np.ones((1024, 1024), np.float32)
    on_device = (mx.array(x), mx.array(w))

    def product() -> None:
        if many_rows.on_cpu():
            x @ w
        else:
            mx.eval(on_device[0] @ on_device[1])

    product()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < TIMED:
        product()
        count += 1
    return 2 * x.size * w.shape[1] * count / (time.perf_counter() - started)


def words(expected: float) -> str:
    """ "about 4 minutes", "about 3 hours"."""
    if expected < 90:
        return f"about {max(1, round(expected / 10)) * 10} seconds"
    if expected < 5400:
        return f"about {round(expected / 60)} minutes"
    return f"about {round(expected / 3600)} hours"
