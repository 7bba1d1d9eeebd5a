"""Plans of launches: how the products of layers are cut on this device, made once and checked before use.

A layer keeps its plans (weights.py). None, or a plan without launches, says that the kernels can't take a
call or failed their check; what then runs instead is not known here.
"""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from spqt_cli.backends.gpu import dequantize, experts, first_use, geometry, rows, tiles, ways, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.launch import Form, Plan, launch
from spqt_cli.backends.interface import Experts, Projection, pairs


@cache
def device_class() -> str:
    """The kind of device that `geometry.choose` tells apart."""
    if mx.cuda.is_available():
        return "cuda"
    letter = str(mx.device_info().get("architecture", ""))[-1:]  # applegpu_g13s: a Max
    return letter if letter in geometry.THREADGROUPS else "g"


def choose(layers: Sequence[Projection], dtype: mx.Dtype) -> geometry.Geometry:
    """The launch geometry of these projections on this device, for an x of this dtype."""
    first, precise = layers[0], dtype == mx.float32
    kind = ways.Kind(dtype, first.bits, first.group_size)
    tile = "" if precise else tiles.best(device_class(), kind, _product_by)
    cut = geometry.choose(device_class(), launching.bands(layers), first.weight.shape[1], precise, tile)
    return _decodings(cut)[0]


def choose_experts(layers: Sequence[Projection], dtype: mx.Dtype, pairs: int) -> geometry.Geometry:
    """As `choose`, for experts and so many pairs of a row and an expert."""
    bands, inputs = launching.bands(layers), layers[0].weight.shape[-2]
    cut = geometry.choose_experts(device_class(), bands, inputs, pairs, dtype == mx.float32)
    return _decodings(cut)[0]


def _product_by(x: mx.array, layer: Projection, tile: str) -> tiles.Product:
    """The sparse product of a layer in such tiles, for x of this shape; the kernels are not checked."""
    bands, inputs = launching.bands([layer]), layer.weight.shape[1]
    cut = _decodings(geometry.choose(device_class(), bands, inputs, False, tile))[0]
    plan = launching.make_plan(x.shape, x.dtype, [layer], cut, Form())
    return lambda row: launch(row, plan)[0][0]


def _decodings(cut: geometry.Geometry) -> list[geometry.Geometry]:
    """The cut, then the same with converted codes: for GPUs that don't read them as subnormal halves."""
    if cut.decode != geometry.HALVES:
        return [cut]
    converted = cut._replace(decode=geometry.CONVERT)
    return [cut, converted] if keeps_subnormal_halves() else [converted]


@cache
def keeps_subnormal_halves() -> bool:
    """Whether this device turns subnormal numbers of 16 bits into floats, which Metal leaves to it."""
    five = mx.array([5], mx.uint16).view(mx.float16)  # 5 times 2^-24
    return bool((five.astype(mx.float32) * 2.0**24 == 5.0).item())


def of_row(x: mx.array, layers: Sequence[Projection], form: Form) -> Plan | None:
    """The plan of a call, made once; None if the layers can't share a launch."""
    kept = weights.kept(layers[0]).plans
    norm = (id(form.norm.weight), form.norm.eps) if form.norm else None
    key = (x.shape, x.dtype, form.dense, form.then, norm, *map(id, layers))
    if key in kept:
        known: Plan | None = kept[key]
        if known is None or known.still_fits(layers):
            return known
    plan = _checked(x, layers, form) if launching.one_launch(layers) else None
    kept[key] = plan
    return plan


def usable(x: mx.array, layers: Sequence[Projection], form: Form) -> Plan | None:
    """The plan of a call; None if the kernels can't."""
    if form.norm is not None and form.norm.weight.dtype != x.dtype:
        return None  # MLX would go on in the wider of the two
    plan = of_row(x, layers, form)
    return None if plan is None or plan.gemv is None else plan


def _checked(x: mx.array, layers: Sequence[Projection], form: Form) -> Plan:
    """A plan whose kernels were checked; without launches where they failed or can't take the arrays."""
    for cut in _decodings(choose(layers, x.dtype)):
        plan = launching.make_plan(x.shape, x.dtype, layers, cut, form)
        if plan.gemv is None or launching.tiny(layers, form):
            break
        if not first_use.verdict(plan, x.dtype, layers, cut):
            return plan
    return plan._replace(gemv=None)


def of_experts(x: mx.array, indices: mx.array, layers: Sequence[Experts]) -> experts.ExpertsPlan | None:
    """The plan of a call, made once; None if the kernel can't take these layers, or failed its check."""
    each = indices.shape[-1] if x.shape[:-2] == (*indices.shape[:-1], 1) else 1
    count = pairs(x, indices)
    kept = weights.kept(layers[0]).plans
    key = ("experts", count, each, x.dtype, *map(id, layers))
    if key in kept:
        known: experts.ExpertsPlan | None = kept[key]
        if known is None or known.still_fits(layers):
            return known
    plan = None
    if launching.one_launch(layers) and not launching.tiny(layers):
        for cut in _decodings(choose_experts(layers, x.dtype, count)):
            made = experts.make_plan(x.dtype, layers, cut, count, each)
            if not first_use.experts_verdict(made, x.dtype, layers, cut):
                plan = made
                break
    kept[key] = plan
    return plan


def of_rows(way: str, x: mx.array, layers: Sequence[Projection], dense: bool) -> rows.RowsPlan | None:
    """The plan for so many rows, made once; None if the kernels can't."""
    count = x.size // x.shape[-1]
    alike = count if count <= 64 else -(-count // 64) * 64  # rows that are cut alike
    kept = weights.kept(layers[0]).plans
    key = (way, alike, x.dtype, dense, *map(id, layers))
    if key in kept:
        known: rows.RowsPlan | None = kept[key]
        if known is None or known.still_fits(layers):
            return known
    plan = _checked_rows(way, x, layers, alike, dense)
    kept[key] = plan
    return plan


def _checked_rows(
    way: str, x: mx.array, layers: Sequence[Projection], count: int, dense: bool
) -> rows.RowsPlan | None:
    """A plan whose kernels were checked, shared by counts that are cut alike; None where they failed."""
    if launching.tiny(layers):
        return None
    bands, inputs = launching.bands(layers), x.shape[-1]
    cut: rows.Cut
    if way == "matrix":
        cut = geometry.choose_matrix(device_class(), bands, inputs, count, layers[0].bits)
    else:
        cut = geometry.choose_rows(device_class(), bands, inputs, count, x.dtype == mx.float32)
    kept = weights.kept(layers[0]).plans
    key = (cut, x.dtype, dense, *map(id, layers))
    known: rows.RowsPlan | None = kept.get(key)
    if known is not None and known.still_fits(layers):
        return known
    plan = rows.make_plan(x.dtype, layers, cut, dense)  # joins arrays, after which older plans are gone
    if first_use.rows_verdict(plan, layers, dense=dense):
        return None
    weights.kept(layers[0]).plans[key] = plan
    return plan


def of_matrix(dtype: mx.Dtype, layer: Projection) -> dequantize.WholePlan | None:
    """The plan for the layer's weights in this dtype, made once; None if the kernel can't."""
    key = ("whole", dtype)
    kept = weights.kept(layer).plans
    if key in kept:
        known: dequantize.WholePlan | None = kept[key]
        if known is None or known.still_fits(layer):
            return known
    plan = None
    if not launching.tiny([layer]):
        made = dequantize.make_plan(dtype, layer)  # may join arrays, after which older plans are gone
        plan = None if first_use.whole_verdict(made, dtype, layer) else made
    kept[key] = plan
    return plan
