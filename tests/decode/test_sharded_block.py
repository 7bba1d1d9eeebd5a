"""The second half of a block of which several processes have a part each, on the CPU and under the emulator.

One process at a time is played: what the others would add is the definition's result less this one's part.
float32, sums in other orders: relative 1e-4 after two products and silu.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from spqt_cli.backends import cpu
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.interface import Norm, Tail, Total
from spqt_cli.decode import hooks, phase, sharding
from spqt_cli.decode.layers import ZigzagLinear, share_input
from tests.backends.gpu.test_kernels import emulated
from tests.decode.test_fused_mlp import on_emulator
from tests.decode.test_sharding import Group

__all__ = ["emulated", "on_emulator"]  # fixtures
hooks.install()
WIDTH, HIDDEN, HEADS = 192, 512, 128


def layer(outputs, inputs, threshold):
    plain = nn.Linear(inputs, outputs, bias=outputs == WIDTH)
    return ZigzagLinear.from_linear(plain, 64, 4, spqt={"threshold": threshold})


def product(one, x):
    """The definition in float64, of a part or of a whole layer."""
    x = np.where(np.abs(x.astype(np.float32)) < np.array(one.threshold), 0, x)
    y = x @ np.array(one.dequantized(), np.float64).T
    return y + np.array(one.bias, np.float64) if "bias" in one else y


def silu(x):
    return x / (1 + np.exp(-x))


class Block:
    """Whole layers, an input of each kind, and what the definition gives."""

    def __init__(self):
        mx.random.seed(7)
        self.out, self.gate, self.up, self.down = (
            layer(WIDTH, HEADS, 0.3), layer(HIDDEN, WIDTH, 0.4), layer(HIDDEN, WIDTH, 0.4),
            layer(WIDTH, HIDDEN, 0.02),
        )  # fmt: skip
        self.norm = Norm(mx.random.uniform(0.5, 1.5, (WIDTH,)), 1e-5)
        self.attended, self.x = mx.random.normal((1, 1, HEADS)), mx.random.normal((1, 1, WIDTH))
        self.h = np.array(self.x, np.float64) + product(self.out, np.array(self.attended, np.float64))
        scale = np.sqrt((self.h**2).mean(-1, keepdims=True) + 1e-5)
        self.normed = self.h / scale * np.array(self.norm.weight, np.float64)
        self.gated = silu(product(self.gate, self.normed)) * product(self.up, self.normed)
        self.y = self.h + product(self.down, self.gated)

    def part(self, at):
        """(the tail of process `at` of two, its own input of out)."""
        group = Group(at, 2)
        out, down = (sharding.shard_linear(one, "sharded-to-all", 1, group) for one in (self.out, self.down))
        pair = [sharding.shard_linear(one, "all-to-sharded", 1, group) for one in (self.gate, self.up)]
        share_input(pair)
        own = slice(at * HEADS // 2, (at + 1) * HEADS // 2)
        inner = slice(at * HIDDEN // 2, (at + 1) * HIDDEN // 2)
        added = [
            product(out, np.array(self.attended, np.float64)[..., own]),
            product(down, self.gated[..., inner]),
        ]
        before = np.array(self.x, np.float64), self.h
        wanted = self.h, self.y
        return Tail(out, self.norm, pair, down), own, added, before, wanted


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_two_sums_of_processes_lie_within_the_tail(backend, at, request):
    if backend == "gpu":
        request.getfixturevalue("on_emulator")
    block = Block()
    tail, own, added, before, wanted = block.part(at)
    adds_residual = backend == "gpu" and at == 0  # the CPU adds it after the sum
    rests = []
    for product_, residual, total in zip(added, before, wanted, strict=True):
        here = product_ + (residual if adds_residual else 0)
        whole = total if backend == "gpu" else total - residual
        rests.append(mx.array((whole - here).astype(np.float32)))
    asked = []

    def add_up(y):
        asked.append(y.shape)
        return y + rests[(len(asked) - 1) % 2]

    calls = gpu if backend == "gpu" else cpu
    step = calls.prepare_tail(block.x, tail._replace(total=Total(add_up, at == 0)))
    counted = [mx.zeros((number,), mx.uint32) for number in (1, 2, 1)]
    with phase.decoding():
        y, counts = step(block.attended[..., own], block.x, counted)
    np.testing.assert_allclose(np.array(y), wanted[1], rtol=1e-4, atol=1e-4)
    assert len(asked) == 2
    active = [int((np.abs(block.normed) >= np.float32(0.4)).sum())] * 2
    assert counts[1].tolist() == active
    inner = block.gated[..., at * HIDDEN // 2 : (at + 1) * HIDDEN // 2]
    assert abs(counts[2].tolist()[0] - (np.abs(inner) >= np.float32(0.02)).sum()) <= 1
