"""Plan and launch of dequantize.metal: a projection's weights as one plain matrix."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from spqt_cli.backends.gpu import geometry, kernel_text, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.launch import Launch
from spqt_cli.backends.interface import Projection


@dataclass(eq=False)
class WholePlan:
    """A launch that holds for this layer's weight."""

    weight: mx.array
    inputs: list[mx.array]  # settings and packed weights
    launch: Launch

    def still_fits(self, layer: Any) -> bool:
        """Whether the layer has the weight that it had when the plan was made."""
        return layer.get("weight") is self.weight


def whole(plan: WholePlan) -> mx.array:
    """The weights, (inputs, outputs of all bands) in the plan's dtype, each rounded once; lazy."""
    (w,) = launching.run(plan.launch, plan.inputs)
    return w


def make_plan(dtype: mx.Dtype, layer: Projection, cut: geometry.WholeGeometry = geometry.WHOLE) -> WholePlan:
    """The plan of this layer for weights of this dtype."""
    joined = weights.join([layer])
    ((band, number),) = launching.bands([layer])
    inputs = layer.weight.shape[1]
    kernel = kernel_text.dequantize_kernel(
        (
            ("T", launching.TYPES[dtype]),
            ("S", launching.TYPES[layer.scales.dtype]),
            ("BITS", layer.bits),
            ("GROUP", layer.group_size),
            ("P", 1),
            ("OUTPUTS", cut.outputs),
            ("UNROLL", cut.stripe),
        ),
        cut.threads,
    )
    grid = (-(-cut.tiles(band) * number // cut.threads), -(-inputs // cut.stripe))
    settings = launching.settings_of([layer], joined, cut, dense=True)
    launch = Launch(kernel, grid, [(inputs, band * number)], [dtype])
    return WholePlan(layer.weight, [settings, joined[0].words], launch)
