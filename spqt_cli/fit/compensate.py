"""Input channels rounded one after another, each error made up for by those that follow: the definition.

cpu/compensate.h is the same, bit for bit within a span, metal/compensate.metal within rounding.

Source: GPTQ (arXiv 2210.17323), in the form of LDLQ (QuIP, arXiv 2307.13304), which needs no inverse: with
H = R R^T, R upper triangular, the target of channel k is w_k plus the sum over earlier channels j of
(w_j - q_j) R[j, k] / R[k, k]. A group of outputs depends on no other.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.fit import grid

SPAN = 64  # channels for which what was rounded before is one matrix product


def compensate(
    target: Any, factor: np.ndarray, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes (inputs, columns) uint8; scales, biases (inputs, groups) float32. The definition of the method.

    target: (inputs, columns), of numpy or MLX; factor: (inputs, inputs), unit upper triangular; float32, in
    one order.
    """
    target = np.asarray(target)
    to_stored, groups = grid.rounding(dtype), (-1, group_size)
    inputs, columns = target.shape
    codes = np.empty(target.shape, np.uint8)
    scales = np.empty((inputs, columns // group_size), np.float32)
    biases = np.empty_like(scales)
    errors = np.empty_like(target)
    for start in range(0, inputs, SPAN):
        end = min(start + SPAN, inputs)
        x = target[start:end] + factor[:start, start:end].T @ errors[:start]
        for k in range(start, end):
            found = grid.search(x[k - start].reshape(groups), bits, to_stored)
            codes[k] = found.codes.reshape(-1)
            scales[k], biases[k] = found.scales[:, 0], found.biases[:, 0]
            errors[k] = target[k] - found.values.reshape(-1)
            x[k - start + 1 :] += factor[k, k + 1 : end, None] * errors[k]
    return codes, scales, biases
