"""LoRA and DoRA on Zigzag layers: mlx-lm's own adapter classes, with the sizes and weights of such a base.

The base skips channels as ever; the adapter's product takes all of x. It knows layers, not files: mlx-lm
loads and trains adapters. Imported when mlx-lm's tuner is, and not before: its classes are built on here.
"""

import operator
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from spqt_cli.decode import foreign
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.errors import UnsupportedError

_lora_from_base, _dora_from_base = LoRALinear.from_base, DoRALinear.from_base


def install() -> None:
    """Let mlx-lm put its adapters around Zigzag layers; doing it twice changes nothing."""
    foreign.replace(LoRALinear, "from_base", staticmethod(lora))
    foreign.replace(DoRALinear, "from_base", staticmethod(dora))


def lora(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
    """As `LoRALinear.from_base`."""
    if not isinstance(linear, ZigzagLinear):
        return _lora_from_base(linear, r, dropout, scale)
    adapter: Any = ZigzagLoRALinear(linear.inputs, linear.outputs, r, dropout, scale)
    adapter.linear = linear
    return adapter


def dora(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
    """As `DoRALinear.from_base`."""
    if not isinstance(linear, ZigzagLinear):
        return _dora_from_base(linear, r, dropout, scale)
    adapter = ZigzagDoRALinear(linear.inputs, linear.outputs, r, dropout, scale)
    adapter.set_linear(linear)
    return adapter


def _matrix(adapter: Any) -> mx.array:
    """The dense part of an adapter, scale * (A B)^T: (outputs, inputs), float32 unless A and B are others."""
    return (adapter.scale * adapter.lora_b.T) @ adapter.lora_a.T


def _refuse_fusing() -> UnsupportedError:
    return UnsupportedError("mlx-lm's fuse can't write Zigzag layers", "spqt fuse MODEL ADAPTER -o FOLDER")


def merged(adapter: Any) -> mx.array:
    """The matrix (outputs, inputs) of a Zigzag base and its adapter together, or its experts', float32."""
    if isinstance(adapter, LoRASwitchLinear):  # mlx-lm's own class serves Zigzag experts
        return (
            adapter.linear.dequantized().astype(mx.float32) + adapter.scale * adapter.lora_b @ adapter.lora_a
        )
    matrix: mx.array = adapter.merged()
    return matrix


class ZigzagLoRALinear(LoRALinear):
    """y = W x + scale * B (A x): W a Zigzag layer, or what a device's profile puts in its place."""

    def fuse(self, dequantize: bool = False) -> Any:
        raise _refuse_fusing()

    def merged(self) -> mx.array:
        """The matrix (outputs, inputs) of base and adapter together, float32."""
        return self.linear.dequantized().astype(mx.float32) + _matrix(self)


class ZigzagDoRALinear(DoRALinear):
    """y = m / |W + D| * (W x + D x), D = scale * B A, norms of rows: W as in ZigzagLoRALinear.

    mlx-lm's class dequantizes W for each product. Here the base multiplies, with its threshold, and the
    factors m / |W + D| are kept for as long as their arrays stay the same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not as nn.Module keeps arrays: these are no parameters.
        object.__setattr__(self, "_known", ((), None))

    def _dequantized_weight(self) -> mx.array:
        if isinstance(self.linear, ZigzagLinear):
            return self.linear.dequantized()
        weight: mx.array = super()._dequantized_weight()
        return weight

    def __call__(self, x: mx.array) -> mx.array:
        y, z = self.linear(x), (self.dropout(x) @ self.lora_a) @ self.lora_b
        factors = self._factors().astype(x.dtype)
        y = factors * (y + (self.scale * z).astype(x.dtype))
        bias = self.linear.get("bias")  # which the base has added; DoRA scales the matrix alone
        return y if bias is None else y + (1 - factors) * bias

    def _factors(self) -> mx.array:
        """m / |W + D|: (outputs,) float32."""
        sources = (self.m, self.lora_a, self.lora_b, self.linear.weight)
        known, factors = self._known
        if not self.training and len(known) == len(sources) and all(map(operator.is_, known, sources)):
            return factors
        norms = mx.linalg.norm(self._dequantized_weight() + _matrix(self), axis=1)
        factors = self.m / mx.stop_gradient(norms)
        if not self.training:
            mx.eval(factors)  # a lazy one would belong to this thread's stream alone
            object.__setattr__(self, "_known", (sources, factors))
        return factors

    def fuse(self, dequantize: bool = False) -> Any:
        raise _refuse_fusing()

    def merged(self) -> mx.array:
        """The matrix (outputs, inputs) of base and adapter together, float32."""
        whole = self._dequantized_weight().astype(mx.float32) + _matrix(self)
        return (self.m / mx.linalg.norm(whole, axis=1))[:, None] * whole
