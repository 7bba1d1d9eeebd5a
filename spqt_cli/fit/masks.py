"""Which inputs are zero while weights are fitted: as in decode steps, the smallest ones of each layer.

A window begins with a prompt, which is dense; the rest stands for decode steps. Weights are rounded with
half a window of prompt and trained with a quarter. What is fitted so serves every sparsity, so the share
that it is fitted at need not be the one to run at.
"""

import mlx.core as mx
import numpy as np

SPARSITY = 0.5
# What gradient allocation gives each kind, relative to the total: means over two models at 50 %. Fits with a
# model's own allocation were no better (docs/log/quality.md), and that one costs a backward pass.
RELATIVE = {
    "q_proj": 1.02, "k_proj": 0.64, "v_proj": 0.54, "o_proj": 0.86,
    "gate_proj": 0.93, "up_proj": 0.87, "down_proj": 1.29,
}  # fmt: skip
HIGHEST = 0.95
SAMPLED = 400_000  # values of which a quantile is taken


def sparsity(path: str, total: float = SPARSITY) -> float:
    """The part of a layer's inputs that is skipped when `total` of the model is."""
    return min(total * RELATIVE.get(path.rpartition(".")[2], 1.0), HIGHEST)


def threshold(x: np.ndarray | mx.array, share: float) -> float:
    """The magnitude below which `share` of the values of x lie."""
    flat = x.reshape(-1)
    flat = flat[:: max(1, len(flat) // SAMPLED)]
    flat = np.abs(np.array(flat.astype(mx.float32)) if isinstance(flat, mx.array) else flat)
    place = min(int(share * len(flat)), len(flat) - 1)
    return float(np.partition(flat, place)[place])


def decode_rows(x: mx.array, window: int, prompt: int) -> slice | None:
    """Where the decode steps are along axis 1 of an input (texts, window, inputs); None for another shape."""
    return slice(prompt, window) if x.ndim == 3 and x.shape[1] == window else None
