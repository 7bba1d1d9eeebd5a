"""Plans and launches of the kernels for more than one row: sparse_rows, matrix_rows and gemm_rows.metal.

A plan holds what does not depend on the number of rows, since prompts come in every length. Which of them
runs is not decided here: see ways.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx

from spqt_cli.backends.gpu import geometry, kernel_text, settings, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.kernel_text import COUNTS, Constants, Kernel
from spqt_cli.backends.gpu.launch import Launch
from spqt_cli.backends.interface import Projection

MOST_SHAPES = 64  # of x whose launches a plan keeps

Cut = geometry.RowsGeometry | geometry.MatrixGeometry | geometry.GemmGeometry


@dataclass(eq=False)
class RowsPlan:
    """Launches for x of any number of rows, with these layers' weights and thresholds."""

    known: tuple[tuple[mx.array, mx.array | None], ...]  # each layer's weight and threshold
    cut: Cut
    inputs: list[mx.array]  # settings and packed weights
    outputs: tuple[int, ...]  # of each layer
    dtype: mx.Dtype
    tiles: int  # of outputs, of all layers
    product: Kernel
    reduce: Kernel | None  # where K is cut into stripes
    stripes: int
    launches: dict[tuple[int, ...], tuple[Launch, Launch | None]] = field(default_factory=dict)

    def still_fits(self, layers: Sequence[Any]) -> bool:
        """Whether these layers have the arrays that they had when the plan was made."""
        pairs = zip(layers, self.known, strict=True)
        return all(
            layer.get("weight") is weight and layer.threshold is threshold
            for layer, (weight, threshold) in pairs
        )

    @property
    def kernels(self) -> list[Kernel]:
        return [self.product] if self.reduce is None else [self.product, self.reduce]


def launch(x: mx.array, plan: RowsPlan) -> tuple[list[mx.array], mx.array]:
    """y of each layer, (..., outputs), and the active channels, (layers, rows) uint32; lazy."""
    rows = x.size // x.shape[-1]
    if x.shape not in plan.launches:
        if len(plan.launches) >= MOST_SHAPES:
            plan.launches.clear()
        plan.launches[x.shape] = _launches(x.shape, rows, plan)
    product, reduce = plan.launches[x.shape]
    count = _count(rows)
    *ys, last = launching.run(product, [launching.in_rows(x), *plan.inputs, count])
    if reduce is not None:
        *ys, last = launching.run(reduce, [last, plan.inputs[0], count])
    return ys, last


@lru_cache(maxsize=512)
def _count(rows: int) -> mx.array:
    """The number of rows as the kernels take it, in an array as large as settings are: see there."""
    array = mx.concatenate([mx.array([rows], mx.uint32), mx.zeros(settings.LEAST_NUMBERS - 1, mx.uint32)])
    mx.eval(array)
    return array


def _launches(shape: tuple[int, ...], rows: int, plan: RowsPlan) -> tuple[Launch, Launch | None]:
    shapes = [*((*shape[:-1], outputs) for outputs in plan.outputs), (len(plan.outputs), rows)]
    dtypes = [*[plan.dtype] * len(plan.outputs), mx.uint32]
    grid = (plan.tiles * -(-rows // plan.cut.tokens), plan.stripes)
    if plan.reduce is None:
        return Launch(plan.product, grid, shapes, dtypes), None
    positions = plan.tiles * plan.cut.tile
    product = Launch(plan.product, grid, [(plan.stripes, rows, positions + COUNTS)], [mx.float32])
    return product, Launch(plan.reduce, (-(-positions // plan.reduce.threads), rows), shapes, dtypes)


def make_plan(dtype: mx.Dtype, layers: Sequence[Projection], cut: Cut, dense: bool) -> RowsPlan:
    """The plan of these layers for x of this dtype; dense: all channels, whatever the thresholds."""
    joined = weights.join(layers)
    stripes = cut.stripes(layers[0].weight.shape[1])
    tiles = sum(cut.tiles(band) * number for band, number in launching.bands(layers))
    constants = _constants(dtype, layers, cut, dense)
    partial = stripes > 1
    if isinstance(cut, geometry.RowsGeometry):
        product = kernel_text.rows_kernel(constants, cut.threads, cut.blocks, partial)
    else:
        name = "gemm" if isinstance(cut, geometry.GemmGeometry) else "matrix"
        product = kernel_text.matrix_kernel(name, constants, cut.threads, cut.blocks, partial)
    return RowsPlan(
        known=tuple((layer.weight, layer.threshold) for layer in layers),
        cut=cut,
        inputs=[launching.settings_of(layers, joined, cut, dense), joined[0].words],
        outputs=tuple(layer.outputs for layer in layers),
        dtype=dtype,
        tiles=tiles,
        product=product,
        reduce=kernel_text.reduce_rows_kernel(constants, cut.tile) if partial else None,
        stripes=stripes,
    )


def _constants(dtype: mx.Dtype, layers: Sequence[Projection], cut: Cut, dense: bool) -> Constants:
    shared: Constants = (
        ("T", launching.TYPES[dtype]),
        ("S", launching.TYPES[layers[0].scales.dtype]),
        ("BITS", layers[0].bits),
        ("GROUP", layers[0].group_size),
        ("P", len(layers)),
        ("PER_CHANNEL", int(launching.per_channel(layers, dense=dense))),
        ("HAS_BIAS", int(launching.has_bias(layers))),
        ("TOKENS", cut.tokens),
        ("OUTPUTS", cut.outputs),
    )
    if not isinstance(cut, geometry.RowsGeometry):
        exact = layers[0].bits < 8 or dtype == mx.float16  # bfloat16 has 8 bits, one of them not written
        paired = exact and layers[0].scales.dtype == dtype
        shared = (
            *shared, ("HALF", int(dtype == mx.float16)), ("PAIRED", int(paired)), ("SPAN", cut.span)
        )  # fmt: skip
    if isinstance(cut, geometry.GemmGeometry):
        simd = (("SIMD_OUTPUTS", cut.simd_outputs), ("SIMD_TOKENS", cut.simd_tokens))
        return (*shared, ("TILE", cut.tile), ("AHEAD", cut.ahead), *simd)
    if isinstance(cut, geometry.MatrixGeometry):
        return (*shared, ("UNROLL", cut.unroll), ("DEPTH", cut.depth))
    return (
        *shared,
        ("VALUES", "float2" if cut.tokens == 2 else "float4"),
        ("LANES", cut.lanes),
        ("UNROLL", cut.unroll),
        ("ROWS", cut.rows),
        ("LIST", cut.list),
        ("SLICE", cut.slice),
        ("DECODE", cut.decode),
    )
