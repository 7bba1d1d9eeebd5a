"""Calibration methods: how a model's sparsity is spread over its layers, and the choice by measurement.

uniform: the same sparsity in every layer (TEAL's criterion, arXiv 2408.14690, without its search).
gradient: by each layer's sensitivity, from gradients through the dense quantized model (gradients.py).
paper: TEAL's block-wise greedy search (greedy.py).

`fast` takes gradient without a comparison. `auto` measures uniform and gradient on held-out windows and
keeps the one with the lower KL divergence to the dense quantized model, so it never ends worse there than
uniform. For a model through which no gradients pass it measures uniform alone, with a note.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from spqt_cli.calibrate import allocation
from spqt_cli.calibrate.gradients import SPARSITIES
from spqt_cli.calibrate.measurements import Allocation, Candidate, Effort, Measurements
from spqt_cli.errors import UnsupportedError
from spqt_cli.format.thresholds import CURVE_SPARSITIES

UNIFORM, PAPER = Allocation("uniform"), Allocation("paper", None)


@dataclass(frozen=True)
class Method:
    """The allocations that a method measures, the most elaborate last, and how much text it runs."""

    allocations: tuple[str, ...]
    effort: Effort


# Gradient windows: from 4 on, more changed KL by under 1 % on SmolLM2-135M; in memory one costs four dense
# passes over it. `fast` is to be fast, so it takes 2 of them and refines less: that leaves realised sparsity
# some tenths of a point off, for a tenth of the time.
METHODS = {
    "auto": Method(("uniform", "gradient"), Effort(gradient_windows=6)),
    "fast": Method(("gradient",), Effort(gradient_windows=2, rounds=1, second_windows=2)),
    "paper": Method(("paper",), Effort()),
    "uniform": Method(("uniform",), Effort()),
}
# Block by block most of the time goes into reading and unpacking weights, which more windows share, and
# no uniform candidate is there to fall back to: `fast` takes as many windows as help. A second sparsity would
# be another pass over all weights; so would a second candidate, hence no `auto`.
STREAMED_METHODS = {
    "fast": Method(("gradient",), Effort(gradient_windows=4, second_windows=0)),
    "paper": Method(("paper",), Effort(second_windows=0)),
    "uniform": Method(("uniform",), Effort(second_windows=0)),
}


def candidates(measurements: Measurements, method: Method, sparsity: float) -> list[Candidate]:
    """The measured candidates of a method at a sparsity (0 to 0.95), the best first."""
    chosen = allocations(measurements, method) if sparsity else [UNIFORM]
    return measurements.measured(chosen, sparsity, method.effort)


def allocations(measurements: Measurements, method: Method) -> list[Allocation]:
    """The allocations of a method, the most elaborate last.

    Raises UnsupportedError for a model without gradients where the method has nothing else.
    """
    found = []
    for name in method.allocations:
        if name != "gradient":
            found.append({"uniform": UNIFORM, "paper": PAPER}[name])
            continue
        try:
            costs = measurements.sensitivities(method.effort.gradient_windows)
        except UnsupportedError as error:
            if not found:
                raise
            note = f"{error.cause}; so all layers have the same sparsity"
            return [Allocation(one.name, one.sparsities, note) for one in found]
        sizes = {path: layer.size for path, layer in measurements.layers.items()}
        found.append(Allocation("gradient", allocated(costs, sizes)))
    return found


def allocated(costs: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Path -> the layer's sparsity at each total of CURVE_SPARSITIES: (50,), rising.

    costs: path -> cost of each of SPARSITIES. sizes: path -> weights in the layer. A layer whose costs are
    all 0 (an expert that no window chose, an output that nothing uses) takes the total, as in `uniform`:
    taken as free it would bear all of it.
    """
    known = {path: cost for path, cost in costs.items() if cost.any()}
    found = dict.fromkeys(costs, np.array(CURVE_SPARSITIES))
    if known:
        found |= allocation.cheapest(known, {path: sizes[path] for path in known}, np.array(SPARSITIES))
    return found
