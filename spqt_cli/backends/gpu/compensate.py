"""Error-compensating rounding on a GPU: a launch for each span of channels, and a product between two.

`spqt_cli/fit/compensate.py` defines it; sums are in other orders here, so that codes tip over now and then.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends.gpu import geometry, launch
from spqt_cli.backends.gpu.kernel_text import HELPERS, THREAD, Kernel
from spqt_cli.backends.gpu.launch import Launch

SPAN = 64  # channels of a launch
TYPES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


def compensate(
    target: Any, factor: np.ndarray, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes (inputs, columns) uint8; scales, biases (inputs, groups) float32, rounded to dtype.

    target: (inputs, columns), of numpy or MLX; factor: (inputs, inputs), unit upper triangular; float32, in
    one order.
    """
    inputs, columns = target.shape
    groups = columns // group_size
    each = spans(bits, group_size, dtype, groups)
    missing = -inputs % SPAN  # channels of zeros, that fill the last span
    wanted = mx.pad(mx.array(target), [(0, missing), (0, 0)])
    upper = mx.pad(mx.array(factor), [(0, missing), (0, missing)])
    ahead, done = wanted, []
    for start in range(0, inputs, SPAN):
        end = start + SPAN
        x, ahead = ahead[:SPAN], ahead[SPAN:]
        corner = mx.contiguous(upper[start:end, start:end])
        arrays = [_grouped(wanted[start:end], groups), _grouped(x, groups), corner]
        codes, scales, biases, errors = launch.run(each, arrays)
        if end < inputs:
            ahead = ahead + upper[start:end, end:].T @ _ungrouped(errors)
        found = [_ungrouped(codes), scales.T, biases.T]
        mx.eval(ahead, *found)
        done.append(found)
    whole = [np.array(mx.concatenate(list(part))[:inputs]) for part in zip(*done, strict=True)]
    return whole[0], whole[1], whole[2]


@cache
def spans(bits: int, group_size: int, dtype: mx.Dtype, groups: int) -> Launch:
    """The launch of a span: of its targets, the same with errors of spans before, and the factor's corner."""
    kernel = _kernel(bits, group_size, TYPES[dtype])
    whole, few = (groups, SPAN, group_size), (groups, SPAN)
    dtypes = [mx.uint8, mx.float32, mx.float32, mx.float32]
    return Launch(kernel, (groups, 1), [whole, few, few, whole], dtypes)


@cache
def _kernel(bits: int, group_size: int, stored: str) -> Kernel:
    return Kernel(
        f"spqt_compensate_{bits}_{group_size}_{stored}",
        ("wanted", "moved", "factor"),
        ("codes", "scales", "biases", "errors"),
        (*HELPERS, "compensate.metal"),
        (("T", stored), ("BITS", bits), ("SIZE", group_size), ("SPAN", SPAN)),
        "CompensateMemory",
        THREAD + "compensate(wanted, moved, factor, codes, scales, biases, errors, memory, me);\n",
        geometry.SIMD,
    )


def _grouped(rows: mx.array, groups: int) -> mx.array:
    """(channels, columns) -> (groups, channels, columns of a group)."""
    return mx.contiguous(rows.reshape(len(rows), groups, -1).swapaxes(0, 1))


def _ungrouped(rows: mx.array) -> mx.array:
    return rows.swapaxes(0, 1).reshape(rows.shape[1], -1)
