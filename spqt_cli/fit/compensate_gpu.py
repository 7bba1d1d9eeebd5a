"""What compensate.py defines, in MLX's operations: for a GPU, some tens of launches a channel.

Its sums are in other orders, so that codes tip over now and then.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from spqt_cli.fit.compensate import SPAN
from spqt_cli.fit.grid import CLIPPED, LEAST_SCALE, REFITS

Step = Callable[..., tuple[mx.array, ...]]


def compensate(
    target: np.ndarray, factor: np.ndarray, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `compensate.compensate`."""
    step = _step(bits, group_size, dtype)
    wanted, upper = mx.array(target), mx.array(factor)
    ahead, done = wanted, []
    for start in range(0, len(target), SPAN):
        x, ahead = ahead[:SPAN], ahead[SPAN:]
        end = start + len(x)
        rows = []
        for k in range(start, end):
            x, *row = step(x, x[k - start], wanted[k], upper[k, start:end])
            rows.append(row)
        *found, errors = (mx.stack(list(part)) for part in zip(*rows, strict=True))
        ahead = ahead + upper[start:end, end:].T @ errors
        done.append(found)
        mx.eval(ahead, *found)
    codes, scales, biases = (np.array(mx.concatenate(list(part))) for part in zip(*done, strict=True))
    return codes, scales, biases


def _step(bits: int, group_size: int, dtype: mx.Dtype) -> Step:
    """One channel: x (span, columns), its own row of it, its target and its row of the factor (span,)
    -> x with its error passed on, codes (columns,) uint8, scales and biases (groups,), its error (columns,).
    """
    most = 2**bits - 1

    def stored(values: mx.array) -> mx.array:
        return values.astype(dtype).astype(mx.float32)

    def encoded(x: mx.array, scales: mx.array, biases: mx.array) -> tuple[mx.array, mx.array]:
        codes = mx.round(mx.clip((x - biases) * (1 / scales), 0, most))
        squares = mx.square(codes * scales + biases - x).sum(-1, keepdims=True)
        return codes, mx.where(mx.isnan(squares), mx.inf, squares)

    def search(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        ends = [mx.array([pair]).reshape(-1, 1, 1) for pair in zip(*_PAIRS, strict=True)]
        below, above = (end * (high - low) for end in ends)
        all_biases = mx.broadcast_to(stored(low + below), (len(_PAIRS), *low.shape))
        all_scales = stored(mx.maximum((high - above - low - below) / most, float(LEAST_SCALE)))
        best = encoded(x, all_scales, all_biases)[1].argmin(0, keepdims=True)
        scales, biases = (mx.take_along_axis(part, best, 0)[0] for part in (all_scales, all_biases))
        codes, squares = encoded(x, scales, biases)
        mean = x.mean(-1, keepdims=True)
        for _ in range(REFITS):
            centre = codes.mean(-1, keepdims=True)
            off = codes - centre
            slope = (off * x).sum(-1, keepdims=True) / mx.maximum(off.square().sum(-1, keepdims=True), 1e-9)
            new = stored(mx.where(mx.abs(slope) < float(LEAST_SCALE), scales, slope))
            shift = stored(mean - new * centre)
            new_codes, new_squares = encoded(x, new, shift)
            wins = new_squares < squares
            codes, scales, biases, squares = (
                mx.where(wins, one, old)
                for one, old in (
                    (new_codes, codes), (new, scales), (shift, biases), (new_squares, squares)
                )
            )  # fmt: skip
        return codes, scales, biases

    def step(x: mx.array, mine: mx.array, target: mx.array, factor: mx.array) -> tuple[mx.array, ...]:
        codes, scales, biases = search(mine.reshape(-1, group_size))
        error = target - (codes * scales + biases).reshape(-1)
        passed_on = x + factor[:, None] * error  # rows done before get zeros
        return passed_on, codes.reshape(-1).astype(mx.uint8), scales[:, 0], biases[:, 0], error

    return mx.compile(step) if mx.default_device().type == mx.DeviceType.gpu else step


_PAIRS = [(below, above) for below in CLIPPED for above in CLIPPED]
