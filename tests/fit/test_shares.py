"""Shares of layers for the training: their costs, and what they gain over the same share everywhere."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.calibrate.gradients import SPARSITIES, drawn_loss
from spqt_cli.convert.journal import Journal
from spqt_cli.decode import session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.fit import predictions, shares
from spqt_cli.fit.matrices import FACTOR, OFFSET
from tests.fit.test_distill import WINDOW, _Reference, distillation, llama, windows_of

__all__ = ["llama"]  # a fixture
PROMPT = WINDOW // 4


def test_costs_are_half_the_square_of_what_is_dropped():
    rng = np.random.default_rng(0)
    x, slopes = (rng.normal(size=(5, 40)).astype(np.float32) for _ in range(2))
    found = shares.skipping_costs(x, slopes)
    order = np.sort(np.abs(x).ravel())
    assert found.shape == (len(SPARSITIES),)
    assert found[0] == 0
    for place, share in enumerate(SPARSITIES[1:], 1):
        threshold = np.quantile(order, share)
        dropped = (x * slopes * (np.abs(x) < threshold)).sum(axis=1)
        assert np.isclose(found[place], (dropped**2).sum() / 2, rtol=1e-5)


class _Shifted(nn.Module):
    """A layer of MLX's own operations, with something added to its input."""

    def __init__(self, layer, path, shifts):
        super().__init__()
        zeros = mx.zeros(layer["scales"].shape)
        self._layer = _Reference(layer, 0.0, {f"{path}.{kind}": zeros for kind in (FACTOR, OFFSET)}, path)
        self._shift = [shifts[path]]

    def __call__(self, x):
        return self._layer(x + self._shift[0])


def test_a_gpu_finds_the_same_costs():
    random = np.random.default_rng(3)
    x, slopes = random.normal(size=(2, 48, 300)).astype(np.float32)
    found = shares.costs_on_gpu(mx.array(x), mx.array(slopes))
    np.testing.assert_allclose(found, shares.skipping_costs(x, slopes), rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float64


def test_slopes_by_inputs_are_those_of_the_whole_model(llama, tmp_path):
    training = distillation(llama, llama / "model", tmp_path / "states")
    tokens = windows_of()[3]
    found: dict[str, tuple[mx.array, mx.array]] = {}
    student = training._student
    hidden = [student.embedded(tokens[None])]
    for number in range(len(student.blocks)):
        training._adopt(number)
        hidden.append(student.forward(number, hidden[-1]))
    training._adopt(-1)
    draw = np.random.default_rng(5)
    slope = predictions.slopes_of_drawn(student.head(tokens[None]), hidden.pop(), PROMPT, draw)
    for number in reversed(range(len(student.blocks))):
        training._adopt(number)
        slope = student.take_inputs(
            number, hidden.pop(), slope, lambda path, x, s: found.update({path: (x, s)})
        )
    assert found.keys() == student.layers.keys()

    model = session.load(llama / "model", dense=True).model
    layers = zigzag_layers(model)

    def objective(shifts):
        modules = [(path, _Shifted(layer, path, shifts)) for path, layer in layers.items()]
        model.update_modules(tree_unflatten(modules))
        return drawn_loss(model(mx.array(tokens[None]))[:, PROMPT:], np.random.default_rng(5))

    shifts = {path: mx.zeros((1, WINDOW, layer.inputs)) for path, layer in layers.items()}
    for path, want in mx.grad(objective)(shifts).items():
        x, slopes = found[path]
        assert x.shape == slopes.shape == want.shape[1:]
        assert mx.allclose(slopes, want[0], rtol=1e-3, atol=2e-4 * float(mx.abs(want).max())), path


def test_they_cost_less_than_the_same_share_everywhere(llama, tmp_path):
    training = distillation(llama, llama / "model", tmp_path / "states")
    training._find_targets()
    training._shares = training._known_shares(Journal(tmp_path, "a job"))
    found = training._shares[0.5]
    sizes = {path: layer.inputs * layer.outputs for path, layer in training._student.layers.items()}
    assert np.average([found[path] for path in sizes], weights=list(sizes.values())) == pytest.approx(
        0.5, abs=0.01
    )
    loss = training._held_out_loss()
    training._shares = {0.5: dict.fromkeys(sizes, 0.5)}
    assert loss < 0.9 * training._held_out_loss()


def test_a_layer_that_is_not_finite_takes_the_total(llama, tmp_path, monkeypatch):
    training = distillation(llama, llama / "model", tmp_path / "states")
    found, path = shares.skipping_costs, "model.layers.0.mlp.down_proj"
    inputs = training._student.layers[path].inputs

    def costs(x, slopes):
        return found(x, slopes) * (np.nan if x.shape[1] == inputs else 1)

    monkeypatch.setattr(shares, "skipping_costs", costs)
    half = training._known_shares(Journal(tmp_path, "a job"))[0.5]
    assert half[path] == pytest.approx(0.5)
    assert all(np.isfinite(share) for share in half.values())


def test_they_are_found_once(llama, tmp_path, monkeypatch):
    training = distillation(llama, llama / "model", tmp_path / "states")
    found = training._known_shares(Journal(tmp_path, "a job"))
    monkeypatch.setattr(shares, "of_layers", None)
    assert training._known_shares(Journal(tmp_path, "a job")) == found
