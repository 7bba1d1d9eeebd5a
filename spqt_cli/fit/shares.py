"""Which layer skips how much while scales and norms are trained: what a calibration would choose.

By gradients of predictions through the model as it was rounded (calibrate/gradients.py), on the first windows
of the text. Layers that share an input skip different shares of it, as they do at run time.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from spqt_cli.calibrate.gradients import SPARSITIES, dropped
from spqt_cli.calibrate.methods import allocated
from spqt_cli.fit import predictions
from spqt_cli.fit.student import Student
from spqt_cli.measure import many_rows
from spqt_cli.measure.many_rows import host

SAMPLED = 100_000  # sizes of which quantiles are taken


def of_layers(
    student: Student,
    windows: np.ndarray,
    adopt: Callable[[int], None],
    seed: int,
    on_progress: Callable[[float, float, str], None],
) -> dict[str, np.ndarray]:
    """Path -> the layer's sparsity at each total of CURVE_SPARSITIES: (50,), rising.

    A layer that no text reached, or whose inputs or slopes are not finite, takes the total. windows: (texts,
    window) tokens. adopt: lets the student have a block's values, by its number; -1 for what
    lies behind the blocks.
    """
    costs = {path: np.zeros(len(SPARSITIES)) for path in student.layers}

    def take(path: str, x: mx.array, slope: mx.array) -> None:
        if len(x) == student.window:  # else of some tokens only, as experts
            x, slope = x[student.prompt :], slope[student.prompt :]
            on_cpu = many_rows.on_cpu()
            costs[path] += skipping_costs(host(x), host(slope)) if on_cpu else costs_on_gpu(x, slope)

    for i, tokens in enumerate(windows):
        on_progress(i, len(windows), "pricing what is skipped")
        states = [student.embedded(tokens[None])]
        for number in range(len(student.blocks)):
            adopt(number)
            states.append(student.forward(number, states[-1]))
        adopt(-1)
        draw = np.random.default_rng([seed, 2, i])
        slope = predictions.slopes_of_drawn(student.head(tokens[None]), states.pop(), student.prompt, draw)
        for number in reversed(range(len(student.blocks))):
            adopt(number)
            slope = student.take_inputs(number, states.pop(), slope, take)
    known = {path: c if np.isfinite(c).all() else np.zeros_like(c) for path, c in costs.items()}
    return allocated(known, {path: one.size for path, one in student.layers.items()})


def skipping_costs(x: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """What it costs to skip each of SPARSITIES of x, in nats, summed over rows: (37,).

    x: (rows, inputs). slopes: of -log p by x, p being what the model gives a token that it draws.
    """
    size = np.abs(x).ravel()
    steps = np.quantile(size[:: max(1, len(size) // SAMPLED)], SPARSITIES)
    steps[0] = 0
    return (dropped(x, slopes, steps) ** 2).sum(axis=0) / 2


def costs_on_gpu(x: mx.array, slopes: mx.array) -> np.ndarray:
    """As `skipping_costs`, of MLX arrays, in float32: a host takes a second for a wide layer."""
    x, size = x.astype(mx.float32), mx.abs(x.astype(mx.float32))
    flat = size.reshape(-1)
    steps = np.quantile(np.array(flat[:: max(1, flat.size // SAMPLED)]), SPARSITIES)
    steps[0] = 0
    lost = x * slopes.astype(mx.float32)
    sums = [mx.where(size < step, lost, 0).sum(axis=1) for step in steps.tolist()]
    return np.array((mx.stack(sums) ** 2).sum(axis=1)).astype(np.float64) / 2
