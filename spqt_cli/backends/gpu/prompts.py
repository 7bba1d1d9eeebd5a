"""Many rows at once on a GPU: prompts. On CUDA a matrix is dequantized once and multiplied as a dense one."""

import contextlib

import mlx.core as mx

from spqt_cli.backends import stock
from spqt_cli.backends.interface import Projection

DEQUANTIZE_ROWS = 16  # from here dequantizing once and a plain matmul is faster on CUDA (docs/log/kernels.md)
MOST_UNFREED = 512 << 20  # bytes of dequantized matrices that wait to be freed
_unfreed: list[int] = []  # bytes of those matrices


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """x @ W.T + bias with all channels: x (..., inputs), several rows -> (..., outputs); lazy."""
    rows = x.size // x.shape[-1]
    if rows < DEQUANTIZE_ROWS or not mx.cuda.is_available():
        return stock.matmul(x, layer)
    packed = (layer.weight, layer.scales, layer.biases)
    w = mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits)  # (bands, inputs, band)
    y = (x.reshape(1, rows, -1) @ w.astype(x.dtype)).swapaxes(0, 1)  # (rows, bands, band)
    y = y.reshape(rows, -1)[:, : layer.outputs].reshape(*x.shape[:-1], layer.outputs)
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
