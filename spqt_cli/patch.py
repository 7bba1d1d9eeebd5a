"""The hook into mlx-lm: importing this module makes `mlx_lm.load` understand Zigzag layers.

`nn.quantize` passes each layer's entry of config.json to `to_quantized`, so one wrapped method is a
complete loader hook. Everything that leans on MLX's or mlx-lm's insides stands here.
"""

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli import kernels
from spqt_cli.layers import SharedInput, ZigzagLinear

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_linear_to_quantized = nn.Linear.to_quantized
_load_weights = nn.Module.load_weights


def _to_quantized(self: nn.Linear, group_size: Any = None, bits: Any = None, mode: str = "affine", **kw: Any):
    if mode == "zigzag":
        return ZigzagLinear.from_linear(self, group_size, bits, **kw)
    return _linear_to_quantized(self, group_size, bits, mode, **kw)
