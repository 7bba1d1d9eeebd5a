"""Zigzag layers cut over processes: the parts' outputs together are those of the whole layer, exactly cut.

One process plays all parts, one after another, with a group that says only who it is; `all_sum` is done here.
Values are sums of the same products in another order: float32, relative 1e-5.
"""

import copy
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.nn.layers import distributed

from spqt_cli.decode import hooks, phase, sharding
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import layout

hooks.install()


class Group:
    """A process's place among `count` that are not there."""

    def __init__(self, at: int, count: int) -> None:
        self.at, self.count = at, count

    def rank(self) -> int:
        return self.at

    def size(self) -> int:
        return self.count


@pytest.fixture(autouse=True)
def _sums_are_left_to_the_test(monkeypatch):
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group=None, **_: y)


def linear(outputs: int, inputs: int, bits: int, group_size: int, *, bias: bool, band: int | None = None):
    mx.random.seed(outputs + inputs + bits)
    plain = nn.Linear(inputs, outputs, bias=bias)
    if bias:
        plain.bias = mx.random.normal((outputs,))
    entry = {"band": band, "threshold": 0.4} if band else {"threshold": 0.4}
    return ZigzagLinear.from_linear(plain, group_size, bits, spqt=entry)


def expected(layer: Any, x: mx.array) -> np.ndarray:
    """y of the whole layer in float64, from its dequantized weights and its mask."""
    masked = np.array(x, np.float64)
    if layer.threshold is not None:
        masked[np.abs(np.array(x, np.float32)) < np.array(layer.threshold)] = 0
    y = masked @ np.array(layer.dequantized(), np.float64).T
    return y + np.array(layer.bias, np.float64) if "bias" in layer else y


def close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


# 4 bands of 64; a last band that is not full; parts that begin within a group; segments, likewise.
OUTPUTS: list[tuple[int, int | None, Any]] = [
    (256, 64, 1), (192, None, 1), (96, None, 1), (80, None, 1), (192, 64, 3), (120, None, [40, 80]),
    (128, None, [0.25, 0.75]),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "bias"), [(4, True), (3, False), (8, True)])
@pytest.mark.parametrize(("outputs", "band", "segments"), OUTPUTS)
def test_outputs_are_cut_at_any_place(outputs, band, segments, bits, bias):
    layer = linear(outputs, 40, bits, 32, bias=bias, band=band)
    x = mx.random.normal((1, 40))
    wanted, before = expected(layer, x), layer.weight
    ends = [outputs * at // segments for at in range(segments)] if isinstance(segments, int) else None
    ends = ends or [0, *(end if isinstance(end, int) else int(end * outputs) for end in segments)]
    pieces = np.split(wanted, ends[1:], axis=1)
    for count in (2, 4):
        for at in range(count):
            part = distributed.shard_linear(
                layer, "all-to-sharded", segments=segments, group=Group(at, count)
            )
            own = np.concatenate([np.split(piece, count, axis=1)[at] for piece in pieces], axis=1)
            with phase.decoding():
                close(part(x), own)
            assert part.outputs * part.inputs <= part.weight.size * 32 // bits  # no more than its groups
    assert layer.weight is before
    assert layer.part is None


def test_whole_bands_stay_as_they_are():
    layer = linear(256, 40, 4, 32, bias=False, band=64)
    part = distributed.shard_linear(layer, "all-to-sharded", group=Group(1, 2))
    assert (part.band, part.part) == (64, None)
    assert mx.array_equal(part.weight, layer.weight[2:])


@pytest.mark.parametrize(("bits", "per_channel"), list(product((4, 6), (False, True))))
def test_inputs_are_cut_and_the_bias_is_added_once(bits, per_channel):
    layer = linear(96, 48, bits, 32, bias=True)
    if per_channel:
        layer.set_threshold(mx.abs(mx.random.normal((48,))) * 0.5)
    x = mx.random.normal((1, 48))
    for segments, count in product((1, 2), (2, 4)):
        parts = [
            distributed.shard_linear(layer, "sharded-to-all", segments=segments, group=Group(at, count))
            for at in range(count)
        ]
        inputs = np.split(np.array(x), segments, axis=1)
        own = [
            mx.array(np.concatenate([np.split(one, count, axis=1)[at] for one in inputs], axis=1))
            for at in range(count)
        ]
        with phase.decoding():
            y = sum(np.array(part(x), np.float64) for part, x in zip(parts, own, strict=True))
        close(y, expected(layer, x))
        assert ["bias" in part for part in parts] == [True] + [False] * (count - 1)


def test_thresholds_of_all_channels_are_cut_whenever_they_are_set():
    layer = linear(64, 48, 4, 32, bias=False)
    part = distributed.shard_linear(layer, "sharded-to-all", group=Group(1, 2))
    whole = mx.arange(48).astype(mx.float32)
    part.set_threshold(whole)
    assert mx.array_equal(part.threshold, whole[24:])
    part.set_threshold(0.25)
    assert part.threshold.tolist() == [0.25]


def test_sizes_that_are_no_multiple_are_refused():
    layer = linear(90, 48, 4, 32, bias=False)
    with pytest.raises(UnsupportedError, match="90 outputs of a layer can't be divided among 4"):
        distributed.shard_linear(layer, "all-to-sharded", group=Group(0, 4))
    with pytest.raises(UnsupportedError, match="48 inputs"):
        distributed.shard_linear(layer, "sharded-to-all", group=Group(0, 5))


def test_experts_are_cut_in_place_as_a_mixture_does_it():
    from mlx_lm.models.switch_layers import SwitchLinear

    from spqt_cli.decode.experts import ZigzagSwitchLinear

    mx.random.seed(3)
    x, chosen = mx.random.normal((1, 1, 1, 48)), mx.array([[2, 0]])
    for how, bias in product(("all-to-sharded", "sharded-to-all"), (True, False)):
        plain = SwitchLinear(48, 80, 4, bias=bias)
        layer = ZigzagSwitchLinear.from_switch_linear(plain, 32, 4, spqt={"threshold": 0.3})
        whole = np.stack(
            [
                np.where(np.abs(np.array(x[0, 0, 0])) < np.float32(0.3), 0, np.array(x[0, 0, 0], np.float64))
                @ np.array(layer.dequantized()[one], np.float64).T
                + (np.array(layer.bias[one], np.float64) * (how == "all-to-sharded") if bias else 0)
                for one in (2, 0)
            ]
        )
        found = []
        for at in range(2):
            part = copy.deepcopy(layer)
            if bias and how == "sharded-to-all":
                del part.bias  # the model's own matter
            given = x if how == "all-to-sharded" else x[..., at * 24 : (at + 1) * 24]
            distributed.shard_inplace(part, how, group=Group(at, 2))
            with phase.decoding():
                found.append(np.array(part(given, chosen))[0, :, 0])
        close(np.concatenate(found, axis=1) if how == "all-to-sharded" else sum(found), whole)


def test_what_would_be_cut_wrong_in_silence_is_refused():
    from mlx_lm.models import qwen3_moe

    assert qwen3_moe.shard_inplace is distributed.shard_inplace  # ours, also where it was imported by name
    layer = linear(64, 64, 4, 32, bias=False)
    with pytest.raises(UnsupportedError, match="axis of its own"):
        distributed.shard_inplace(layer, lambda path, weight: 0, group=Group(0, 2))
    around = nn.Sequential(layer)
    with pytest.raises(UnsupportedError, match="as a whole"):
        distributed.shard_inplace(around, "all-to-sharded", group=Group(0, 2))
    part = distributed.shard_linear(layer, "sharded-to-all", group=Group(0, 2))
    with pytest.raises(UnsupportedError, match="cut twice"):
        distributed.shard_linear(part, "sharded-to-all", group=Group(0, 2))


def test_row_grouped_layers_are_cut_by_mlx():
    stock = nn.QuantizedLinear(64, 64, group_size=32, bits=4)
    part = distributed.shard_linear(stock, "all-to-sharded", group=Group(1, 2))
    assert type(part) is distributed.QuantizedAllToShardedLinear
    assert mx.array_equal(part.weight, stock.weight[32:])
    distributed.shard_inplace(stock, "all-to-sharded", group=Group(0, 2))
    assert stock.weight.shape[0] == 32


def test_groups_are_taken_in_any_order():
    w = mx.random.normal((160, 8))
    packed = layout.quantize(w, 4, 32, 96)  # 2 bands of 3 groups, the last of 2
    taken = [layout.take_groups(one, [range(4, 5), range(1, 3)], 3, 2) for one in packed]
    whole = layout.dequantize(*packed, outputs=160, bits=4, group_size=32)
    found = layout.dequantize(*taken, outputs=96, bits=4, group_size=32)
    assert mx.array_equal(found, mx.concatenate([whole[128:160], whole[32:96]]))


def test_a_copy_of_a_part_is_of_the_same_group():
    part = sharding.Part(group=Group(0, 2))
    assert copy.deepcopy({"part": part})["part"].group is part.group
