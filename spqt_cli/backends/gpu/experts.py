"""Few rows through the experts chosen for each on a GPU: one launch of sparse_experts.metal for all of them.

A plan holds what depends on shapes and weights; backend.py says whether its kernel may be used.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from spqt_cli.backends.gpu import geometry, kernel_text, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.launch import Form, Launch
from spqt_cli.backends.interface import Experts

SMALL = 8  # elements: MLX hands a smaller array to Metal in another address space


class ExpertsPlan(NamedTuple):
    """All that a call can reuse. each: pairs of a row of x and an expert that one row has."""

    known: tuple[tuple[mx.array, mx.array | None], ...]  # each layer's weight and threshold
    inputs: list[mx.array]  # settings and packed weights
    form: mx.array  # (2,) uint32
    launch: Launch
    pairs: int
    each: int

    def still_fits(self, layers: Sequence[Any]) -> bool:
        """Whether these layers have the arrays that they had when the plan was made."""
        now = [(layer.get("weight"), layer.threshold) for layer in layers]
        return all(a is c and b is d for (a, b), (c, d) in zip(now, self.known, strict=True))


def make_plan(
    dtype: mx.Dtype, layers: Sequence[Experts], cut: geometry.Geometry, pairs: int, each: int
) -> ExpertsPlan:
    """The launch for these layers and so many pairs; cut: in one stripe. The layers' biases are left out."""
    dense = all(layer.threshold is None for layer in layers)
    joined = weights.join(layers)
    settings = launching.settings_of(layers, joined, cut, dense, biased=False)
    constants = dict(launching.constants_of(dtype, layers, cut, Form(dense))) | {"HAS_BIAS": 0}
    constants["FEW_PAIRS"] = int(pairs < SMALL)
    kernel = kernel_text.experts_kernel(tuple(constants.items()), cut.threads)
    tiles = sum(cut.tiles(band) * number for band, number in launching.bands(layers))
    shapes = [*((pairs, layer.outputs) for layer in layers), (pairs, len(layers))]
    dtypes = [*[dtype] * len(layers), mx.uint32]
    form = mx.array([each, layers[0].weight.shape[0]], mx.uint32)
    mx.eval(form)
    known = tuple((layer.weight, layer.threshold) for layer in layers)
    one = Launch(kernel, (tiles, pairs), shapes, dtypes)
    return ExpertsPlan(known, [settings, joined[0].words], form, one, pairs, each)


def launch(x: mx.array, indices: mx.array, plan: ExpertsPlan) -> tuple[list[mx.array], mx.array]:
    """y of each layer, (pairs, outputs), and active channels, (pairs, layers) uint32; lazy.

    x: (pairs / each, inputs) in any shape; indices: (pairs,) in any shape.
    """
    x, chosen = launching.in_rows(x), launching.in_rows(indices.reshape(-1).astype(mx.uint32))
    *outputs, active = launching.run(plan.launch, [x, *plan.inputs, chosen, plan.form])
    return outputs, active
