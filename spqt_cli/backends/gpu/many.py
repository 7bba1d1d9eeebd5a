"""Products of several rows: which way each takes, of those that ways.py has timed on this device."""

import contextlib
from collections.abc import Sequence

import mlx.core as mx

from spqt_cli.backends import stock
from spqt_cli.backends.gpu import dequantize, plans, rows, ways
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.launch import Form, launch
from spqt_cli.backends.interface import Projection
from spqt_cli.format import layout

MOST_UNFREED = 512 << 20  # bytes of dequantized matrices that wait to be freed
_unfreed: list[int] = []  # bytes of those matrices


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """x @ W.T + bias with all channels: x (..., inputs) -> (..., outputs); lazy."""
    rows = x.size // x.shape[-1]
    if rows == 1:
        plan = plans.usable(x, [layer], Form(dense=True))
        return stock.matmul(x, layer) if plan is None else launch(x, plan)[0][0]
    return WAYS[ways.best(rows, layer, x.dtype, WAYS)](x, layer)


def sparse_rows(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """A few rows through several projections of one input, each over its own active channels; lazy.

    x: (..., inputs) of 2 to 64 rows, float16, bfloat16 or float32. A layer without threshold runs dense.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels, (layers, rows) uint32.
    """
    if not launching.one_launch(layers):
        parts = [sparse_rows(x, [layer]) for layer in layers]
        return [ys[0] for ys, _ in parts], mx.concatenate([active for _, active in parts])
    count = x.size // x.shape[-1]
    way = ways.best(count, layers[0], x.dtype, WAYS)
    dense = all(layer.threshold is None for layer in layers)
    if way == "few" and (plan := plans.of_rows("few", x, layers, dense)):
        return rows.launch(x, plan)
    own = [plans.of_rows("matrix", x, [layer], dense) if way == "matrix" else None for layer in layers]
    found = [
        _masked_rows(x, layer, way) if plan is None else rows.launch(x, plan)
        for layer, plan in zip(layers, own, strict=True)
    ]
    return [ys[0] for ys, _ in found], mx.concatenate([active for _, active in found])


def _masked_rows(x: mx.array, layer: Projection, way: str) -> tuple[list[mx.array], mx.array]:
    """As `sparse_rows`, of one projection: x masked first, then all weights."""
    masked = x if layer.threshold is None else layout.mask(x, layer.threshold)
    return [WAYS[way](masked, layer)], stock.active_rows(x.reshape(-1, x.shape[-1]), layer)[None]


def many_rows() -> list[str]:
    """How many rows are multiplied on this device, a line for each kind of layer; timed now if nobody did."""
    if not ways.report():
        ways.choice_for(ways.Kind(mx.bfloat16, 4, 64), WAYS)
    return ways.report()


def _few(x: mx.array, layer: Projection) -> mx.array:
    plan = plans.of_rows("few", x, [layer], dense=True)
    return stock.matmul(x, layer) if plan is None else rows.launch(x, plan)[0][0]


def _matrix(x: mx.array, layer: Projection) -> mx.array:
    plan = plans.of_rows("matrix", x, [layer], dense=True)
    return _dequantized(x, layer) if plan is None else rows.launch(x, plan)[0][0]


def _dequantized(x: mx.array, layer: Projection) -> mx.array:
    """As `matmul`, the matrix dequantized once and multiplied as a dense one."""
    plan = plans.of_matrix(x.dtype, layer)
    if plan is None:
        w = mx.dequantize(
            layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits
        )
        w = w.swapaxes(0, 1).reshape(x.shape[-1], -1).astype(x.dtype)
    else:
        w = dequantize.whole(plan)
    y = x.reshape(-1, x.shape[-1]) @ w
    y = y[:, : layer.outputs].reshape(*x.shape[:-1], layer.outputs)
    _free_in_time(y, w.nbytes)
    bias = layer.get("bias")
    return y if bias is None else y + bias


def _free_in_time(y: mx.array, size: int) -> None:
    """Evaluate y when the matrices dequantized since the last time are many bytes.

    MLX frees temporaries once some hundred operations have run, which would keep several blocks' matrices.
    """
    _unfreed.append(size)
    if sum(_unfreed) > MOST_UNFREED:
        _unfreed.clear()
        with contextlib.suppress(ValueError):  # within mx.compile or mx.grad nothing can be evaluated
            mx.eval(y)


WAYS: dict[str, ways.Call] = {
    "few": _few,
    "matrix": _matrix,
    "quantized": stock.matmul,
    "dequantized": _dequantized,
}
