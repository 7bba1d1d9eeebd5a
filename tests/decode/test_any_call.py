"""Layers called otherwise than once a pass with (1, rows, inputs): token by token, seldom, never."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from spqt_cli.calibrate import calibrate, gradients
from spqt_cli.calibrate.gradients import SPARSITIES
from spqt_cli.calibrate.methods import allocated
from spqt_cli.convert import convert
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.errors import ResourceError, UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import probes
from tests.lib.architecture_check import _write_source

INPUTS, OUTPUTS, TOKENS = 64, 32, 12


class Cell(nn.Module):
    """Two layers: one sees all tokens, the other one after another, as a vector."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        self.whole, self.single, self.never = (
            ZigzagLinear.from_linear(nn.Linear(INPUTS, OUTPUTS, bias=False), 32, 8) for _ in range(3)
        )

    def __call__(self, x: mx.array) -> mx.array:
        return self.whole(x) * mx.stack([self.single(row) for row in x[0]])[None]


@pytest.fixture
def x() -> mx.array:
    return mx.random.normal((1, TOKENS, INPUTS), key=mx.random.key(1))


def test_gradients_of_any_call_are_those_of_calculus(x):
    cell = Cell()
    with probes.probing(cell) as harness, harness.differentiated() as slopes:

        def objective(origin: mx.array) -> mx.array:
            slopes.origin = origin
            return cell(x).sum()

        gradients.differentiate(objective, slopes.origin)
    found: dict[str, dict[bytes, np.ndarray]] = {"whole": {}, "single": {}}
    for path, seen, gradient in slopes.pairs():
        for row, slope in zip(*(np.array(a).reshape(-1, INPUTS) for a in (seen, gradient)), strict=True):
            found[path][row.tobytes()] = slope
    w, v = (np.array(layer.dequantized()) for layer in (cell.whole, cell.single))
    for row in np.array(x[0]):
        # d/dx sum (W x) * (V x), one factor at a time; float32 sums of 32 products
        assert found["whole"][row.tobytes()] == pytest.approx((v @ row) @ w, rel=1e-4, abs=1e-4)
        assert found["single"][row.tobytes()] == pytest.approx((w @ row) @ v, rel=1e-4, abs=1e-4)


def test_single_tokens_are_counted_and_layers_not_reached_are_not(x):
    cell = Cell()
    with probes.probing(cell) as harness, harness.counting(8, TOKENS) as counts:
        mx.eval(cell(x))
    assert counts.keys() == {"whole", "single"}
    assert (counts["whole"] == thresholds.histogram(x[:, 8:])).all()
    assert (counts["single"] == thresholds.histogram(x)).all()


def test_siblings_that_share_an_input_once_keep_their_own_counts(x):
    cell = Cell()
    with probes.probing(cell) as harness, harness.counting() as counts:
        mx.eval(cell.whole(x), cell.single(x), cell.single(2 * x))
    assert (counts["single"] == thresholds.histogram(2 * x)).all()


def test_rows_of_a_window_need_layers_that_see_them_all(x):
    masking = probes.Masking({"single": 0.5})
    with pytest.raises(UnsupportedError, match="all positions"):
        masking.apply("single", x[0, 0], np.ones((1, TOKENS), bool))


def test_layer_without_a_cost_skips_the_total():
    cost = np.linspace(0, 1, len(SPARSITIES)) ** 2
    found = allocated({"one": cost, "unseen": np.zeros(len(SPARSITIES))}, {"one": 100, "unseen": 10_000})
    assert found["unseen"].tolist() == list(CURVE_SPARSITIES)
    assert found["one"][25] == pytest.approx(0.5, abs=0.03)


def test_operation_without_a_gradient_is_named():
    def objective(x: mx.array) -> mx.array:
        return mx.bitwise_and(x.astype(mx.int32), 3).astype(mx.float32).sum() + mx.linalg.svd(x)[0].sum()

    with pytest.raises(UnsupportedError, match="no gradients") as caught:
        gradients.differentiate(objective, mx.ones((3, 3)))
    assert caught.value.exit_code == 4


def test_memory_that_runs_out_is_not_a_missing_gradient():
    """`auto` would fall back to uniform, and a streamed calibration load the whole model."""

    def objective(x: mx.array) -> mx.array:
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    with pytest.raises(ResourceError, match="do not fit in memory"):
        gradients.differentiate(objective, mx.ones((3, 3)))


@pytest.mark.parametrize("method", ["auto", "fast"])
def test_model_without_gradients(method, tmp_path, monkeypatch):
    _write_source("gpt2", tmp_path / "source")
    convert.convert(str(tmp_path / "source"), tmp_path / "model", convert.ConvertOptions(group_size=32))
    monkeypatch.setattr(gradients, "drawn_loss", lambda logits, draw: mx.linalg.svd(logits[0])[1].sum())
    options = calibrate.CalibrateOptions(tokens=128, window=32, method=method)
    if method == "fast":
        with pytest.raises(UnsupportedError, match="no gradients"):
            calibrate.calibrate(tmp_path / "model", options, lambda *_: None)
        assert not list((tmp_path / "model").glob(".spqt-*"))  # the method that the hint names can begin
        return
    result = calibrate.calibrate(tmp_path / "model", options, lambda *_: None)
    assert [one.name for one in result.tried] == ["uniform"]
    assert "no gradients" in result.note
    assert "all layers have the same sparsity" in result.note
