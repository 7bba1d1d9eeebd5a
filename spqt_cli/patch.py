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


def _cast_for_cpu(self: nn.Module, *args: Any, **kw: Any) -> nn.Module:
    """Load weights; a Zigzag model on the CPU then computes in float32.

    MLX's CPU build runs float16 and bfloat16 30 times slower than float32. The stored folder keeps
    its dtype; the cast is lazy, so each array is converted as it is first read.
    """
    result = _load_weights(self, *args, **kw)
    layers = zigzag_layers(self)
    if layers and mx.default_device().type == mx.DeviceType.cpu:
        self.set_dtype(mx.float32)
    return result


def zigzag_layers(model: nn.Module) -> dict[str, ZigzagLinear]:
    """Path -> layer, for every Zigzag layer of a model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ZigzagLinear)}


def install() -> None:
    """Patch MLX's modules; doing it twice changes nothing."""
    nn.Linear.to_quantized = _to_quantized
    nn.Module.load_weights = _cast_for_cpu


install()
