"""ZigzagLinear: sparse in decode steps, dense in prompts, whatever the shape; siblings in one launch."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from spqt_cli.backends import select
from spqt_cli.decode import active_counts, phase
from spqt_cli.decode.layers import ZigzagLinear, share_input
from spqt_cli.format import layout

pytestmark = pytest.mark.usefixtures("decode_steps")


def make_layer(outputs: int = 96, inputs: int = 64, threshold: float | None = 0.5, bias: bool = False):
    mx.random.seed(outputs * inputs)
    layer = ZigzagLinear.from_linear(nn.Linear(inputs, outputs, bias=bias), 32, 4)
    layer.set_threshold(threshold)
    return layer


def expected(layer: ZigzagLinear, x: mx.array, masked: bool) -> mx.array:
    if masked:
        x = layout.mask(x, layer.threshold)
    y = x @ layer.dequantized().T
    return y + layer.bias if "bias" in layer else y


def close(a: mx.array, b: mx.array) -> bool:
    # float32 sums of 64 terms of size about 1: 64 * 6e-8, times a few for the order of summation.
    return bool(mx.allclose(a, b, rtol=1e-4, atol=2e-5))


SHAPES = [(64,), (1, 64), (1, 1, 64), (1, 2, 64), (3, 1, 64), (2, 5, 64), (3, 1, 1, 64)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fault_47_prompts_are_dense_in_every_shape(shape, bias):
    layer = make_layer(bias=bias)
    x = mx.random.normal(shape)
    with phase.prompting():
        assert close(layer(x), expected(layer, x, masked=False))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fault_47_each_row_of_a_decode_step_is_masked_by_itself(shape, bias):
    layer = make_layer(bias=bias)
    x = mx.random.normal(shape)
    y = layer(x)
    rows = [layer(row) for row in x.reshape(-1, 64)]
    assert y.shape == (*shape[:-1], 96)
    assert close(y, expected(layer, x, masked=True))
    assert close(y.reshape(-1, 96), mx.stack(rows))


@pytest.mark.parametrize("rows", [1, 4])
def test_siblings_of_which_one_skips_are_dense_in_prompts(rows):
    """The one without a threshold must not compute the other's product for it."""
    dense, sparse = siblings(None, 0.5)
    x = mx.random.normal((1, rows, 64))
    with phase.prompting():
        for layer in (dense, sparse):
            assert close(layer(x), expected(layer, x, masked=False))


def test_without_threshold_one_row_is_dense():
    layer = make_layer(threshold=None)
    x = mx.random.normal((1, 1, 64))
    assert close(layer(x), expected(layer, x, masked=False))


def test_fault_34_threshold_zero_equals_dense():
    layer = make_layer(threshold=0.0)
    x = mx.random.normal((1, 1, 64))
    assert close(layer(x), expected(layer, x, masked=False))


@pytest.mark.parametrize("bias", [False, True])
def test_fault_35_all_inactive_gives_the_bias(bias):
    layer = make_layer(threshold=1e30, bias=bias)
    y = layer(mx.random.normal((1, 1, 64)))
    assert mx.array_equal(y[0, 0], layer.bias if bias else mx.zeros(96))


def test_fault_36_all_active_equals_dense():
    layer = make_layer(threshold=1e-30)
    x = mx.random.normal((1, 1, 64)) + 3
    assert close(layer(x), expected(layer, x, masked=False))


def test_fault_38_nan_activation_counts_as_active():
    layer = make_layer(threshold=10.0)
    x = mx.zeros((1, 1, 64))
    x[0, 0, 5] = float("nan")
    assert mx.isnan(layer(x)).all()


def siblings(*thresholds: float | None) -> list[ZigzagLinear]:
    layers = [make_layer(32 * (at + 1), threshold=value) for at, value in enumerate(thresholds)]
    return share_input(layers).layers


def test_siblings_give_what_each_gives_alone():
    layers = siblings(0.2, 0.5, 0.9)
    x = mx.random.normal((1, 1, 64))
    for layer in layers:
        assert close(layer(x), expected(layer, x, masked=True))


@pytest.mark.parametrize("change", ["threshold", "weights"])
def test_a_change_between_two_steps_is_seen(change):
    first, second = siblings(0.2, 0.5)
    x = mx.random.normal((1, 1, 64))
    mx.eval(first(x), second(x))
    if change == "threshold":
        first.set_threshold(0.9)
    else:
        other = make_layer(32, threshold=0.2)
        first.weight, first.scales, first.biases = other.weight, other.scales, other["biases"] * 2
    assert close(first(x), expected(first, x, masked=True))


def test_siblings_fed_different_inputs_stay_right():
    first, second = siblings(0.2, 0.5)
    x, other = mx.random.normal((2, 1, 1, 64))
    assert close(first(x), expected(first, x, masked=True))
    assert close(second(other), expected(second, other, masked=True))
    assert close(second(x), expected(second, x, masked=True))
    assert close(first(other), expected(first, other, masked=True))


def test_a_sibling_called_twice_is_computed_again():
    first, _ = siblings(0.2, 0.5)
    x = mx.random.normal((1, 1, 64))
    assert mx.array_equal(first(x), first(x))


def test_siblings_run_in_one_launch(monkeypatch):
    layers = siblings(0.2, 0.5, 0.9)
    launches = []
    original = select.prepare

    def prepare(some):
        step = original(some)
        return lambda x, counted: launches.append(len(some)) or step(x, counted)

    monkeypatch.setattr(select, "prepare", prepare)
    x = mx.random.normal((1, 1, 64))
    for layer in layers:
        layer(x)
    assert launches == [3]


def test_a_dense_sibling_leaves_the_others_sparse():
    sparse, dense = siblings(0.5, None)
    x = mx.random.normal((1, 1, 64))
    assert close(sparse(x), expected(sparse, x, masked=True))
    assert close(dense(x), expected(dense, x, masked=False))


def test_counts_are_the_active_channels():
    layers = siblings(0.3, 0.8)
    alone = make_layer(threshold=0.5)
    inputs = mx.random.normal((70, 1, 1, 64), key=mx.random.key(3))
    with active_counts.counting() as counter:
        for x in inputs:
            for layer in [*layers, alone]:
                layer(x)
    counted = {id(layer): density for layer, density in counter.densities()}
    for layer in [*layers, alone]:
        share = 1 - layout.inactive(inputs, layer.threshold).astype(mx.float32).mean().item()
        assert counted[id(layer)] == pytest.approx(share, abs=1e-6)


def test_counts_of_many_rows_are_a_mean_over_rows():
    """Three steps of one row and two of four: 11 rows; siblings, whose rows run in two ways."""
    layers = siblings(0.3, 0.8)
    steps = [
        mx.random.normal((1, rows, 64), key=mx.random.key(rows + at))
        for at, rows in enumerate((1, 4, 1, 1, 4))
    ]
    with active_counts.counting() as counter:
        for x in steps:
            for layer in layers:
                layer(x)
        with phase.prompting():
            layers[0](steps[0])
            layers[0](steps[1])
    found = {id(share.layer): share for share in counter.shares()}
    for layer in layers:
        kept = [np.abs(np.array(x)) >= layer.threshold.item() for x in steps]
        share = found[id(layer)]
        assert share.active == pytest.approx(np.concatenate(kept, axis=1).mean())
        assert share.read == pytest.approx(np.mean([one.any(axis=1).mean() for one in kept]))


def test_nothing_is_counted_outside_the_block():
    layer = make_layer()
    with active_counts.counting() as counter:
        pass
    layer(mx.zeros((1, 1, 64)))
    assert counter.densities() == []


def test_a_printed_layer_names_its_sizes():
    text = str(make_layer(100, 60))
    assert "input_dims=60" in text
    assert "output_dims=100" in text


def test_from_linear_evaluates_nothing(monkeypatch):
    """mlx-lm builds layers over random weights that are never needed."""
    linear = nn.Linear(64, 96)
    monkeypatch.setattr(layout, "quantize", lambda *a: (mx.zeros(1), mx.zeros(1), mx.zeros(1)))
    evaluated = []
    original = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: evaluated.extend(a) or original(*a))
    ZigzagLinear.from_linear(linear, 32, 4, spqt={"band": 32, "threshold": 0.5})
    assert all(array.size == 1 for array in evaluated)


def test_from_linear_takes_mlx_s_arguments_and_no_other_mode():
    linear = nn.Linear(64, 96)
    assert ZigzagLinear.from_linear(linear, 32, 4, "zigzag").group_size == 32
    with pytest.raises(ValueError, match="mxfp4"):
        ZigzagLinear.from_linear(linear, 32, 4, "mxfp4")
