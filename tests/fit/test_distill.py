"""Training of scales, biases and norms: its slopes, what it gains, what a killed run leaves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_unflatten

from spqt_cli.backends import cpu
from spqt_cli.convert import convert, source_model
from spqt_cli.convert.journal import Journal
from spqt_cli.decode import hooks_cpu, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.fit import distill, predictions, student
from spqt_cli.fit.distill import Distillation, Options
from spqt_cli.fit.source_blocks import SourceBlocks
from spqt_cli.fit.store import Store
from spqt_cli.fit.weights_file import WeightsFile
from spqt_cli.format import layout
from spqt_cli.format.folder import Folder
from spqt_cli.measure import many_rows
from tests.conftest import tiny_checkpoint
from tests.lib.converting import Stop

WINDOW = 32
OPTIONS = Options(steps=10, rate=2e-3, save_every=3)


def windows_of(count: int = 25) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 500, (count, WINDOW)).astype(np.int32)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def made(request, tmp_path_factory) -> Path:
    """A source and its conversion; an odd width of bands is among them."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(folder / "source", request.param, dtype=mx.float16, torch_dtype="float16")
    convert.convert(str(source), folder / "model", convert.ConvertOptions(bits=3, group_size=32))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    source = tiny_checkpoint(folder / "source", "llama", dtype=mx.float16, torch_dtype="float16")
    convert.convert(str(source), folder / "model", convert.ConvertOptions(bits=3, group_size=32))
    return folder


def distillation(
    made: Path, model: Path, work: Path, windows=None, progress=lambda *_: None, options=OPTIONS
):
    loaded = session.load_lazily(Folder(model))
    source = SourceBlocks(
        source_model.open_source(str(made / "source")), list(zigzag_layers(loaded.model)), WINDOW
    )
    windows = windows_of() if windows is None else windows
    return Distillation(loaded, source, windows, Store(work), progress, options)


def run(made: Path, where: Path, progress=lambda *_: None, options=OPTIONS):
    """Train a copy of the model in `where`, going on with what is there; the result."""
    if not (where / "model").exists():
        shutil.copytree(made / "model", where / "model")
    model = where / "model"
    training = distillation(made, model, where / "states", progress=progress, options=options)
    with WeightsFile(model) as output:
        found = training.run(output, Journal(where, "a job"))
        output.finish("fit", {"method": "full"})
    return found


def weights(where: Path) -> bytes:
    return (where / "model" / "model.safetensors").read_bytes()


class _Reference(nn.Module):
    """A layer of MLX's own operations, from packed weights and what is trained."""

    def __init__(self, layer, threshold, values, path):
        super().__init__()
        self._of = layer, threshold, values, path

    def __call__(self, x):
        layer, threshold, values, path = self._of
        scales, biases = (layer[part].astype(mx.float32) for part in ("scales", "biases"))
        form = {"outputs": layer.outputs, "bits": layer.bits, "group_size": layer.group_size}
        ones = mx.ones_like(scales)
        codes = mx.dequantize(layer.weight, ones, 0 * ones, layer.group_size, layer.bits)
        codes = codes.reshape(*scales.shape, layer.group_size)
        spread = mx.maximum(mx.abs(scales) * mx.sqrt(mx.var(codes, -1, ddof=1)), 1e-6)
        factor, offset = values[f"{path}.factor"], values[f"{path}.offset"]
        new = (codes * scales[..., None] + biases[..., None]) * (1 + factor[..., None])
        new = new + (offset * spread)[..., None]
        bands, inputs, groups = scales.shape
        w = new.reshape(bands, inputs, groups * layer.group_size).swapaxes(1, 2).reshape(-1, inputs)
        prompt = x.shape[1] // 4
        x = mx.concatenate([x[:, :prompt], layout.mask(x[:, prompt:], mx.array([threshold]))], axis=1)
        y = x @ w[: form["outputs"]].T
        return y + layer["bias"].astype(mx.float32) if "bias" in layer else y


def reference(made: Path, values: dict, thresholds: dict, tokens: np.ndarray, weights: list[np.ndarray]):
    """The loss on windows, of whose positions these are the weights, and its slopes by values, by MLX through
    the whole model.
    """
    model = session.load(made / "model", dense=True).model
    layers = zigzag_layers(model)
    stock, _ = session.load_stock(made / "source", json.loads((made / "source" / "config.json").read_text()))
    stock.set_dtype(mx.float32)
    wanted = stock(mx.array(tokens)).astype(mx.float32)
    weight = mx.array(np.stack(weights))

    def objective(values):
        model.update_modules(
            tree_unflatten([(p, _Reference(layer, thresholds[p], values, p)) for p, layer in layers.items()])
        )
        norms = [(name, value) for name, value in values.items() if name.endswith(".weight")]
        model.update(tree_unflatten(norms))
        log_q = nn.log_softmax(model(mx.array(tokens)), axis=-1)
        log_p = nn.log_softmax(wanted, axis=-1)
        return ((mx.exp(log_p) * (log_p - log_q)).sum(-1) * weight).sum(-1).mean()

    return mx.value_and_grad(objective)(values)


@pytest.mark.parametrize("scored", [1.0, 0.5])
def test_slopes_are_those_of_the_whole_model(made, tmp_path, scored):
    training = distillation(
        made, made / "model", tmp_path / "states", options=replace(OPTIONS, scored=scored)
    )
    training._find_targets()
    mx.random.seed(1)
    values = {}
    for part in training._parts:
        for name, value in part.values.items():
            change = 0.05 * mx.random.normal(value.shape)
            part.values[name] = value + change
            values[name] = part.values[name]
    # A threshold is an input's own size, which other sums may put on the other side.
    paths = sorted(training._student.layers)
    training._shares = {0.4: dict(zip(paths, np.linspace(0.3, 0.5, len(paths)).tolist(), strict=True))}
    thresholds = {path: 0.9999 * value for path, value in training._settled(0.4).items()}
    training._student.thresholds = thresholds
    assert all(thresholds[path] > 0 for path in paths)
    assert len(set(thresholds.values())) == len(paths)  # also where an input is shared
    which, weight = [4, 2], predictions.weights(WINDOW, WINDOW // 4)
    draw = np.random.default_rng(3)
    weights = [predictions.drawn(weight, WINDOW // 4, scored, draw) for _ in which]
    assert all(np.count_nonzero(one) == round(scored * np.count_nonzero(weight)) for one in weights)
    loss, slopes = reference(made, values, thresholds, windows_of()[which], weights)
    found = {}
    for _, some in training.slopes(which, np.random.default_rng(3)):
        found |= some
    assert found.keys() == values.keys() == slopes.keys()
    norms = [name for name in found if name.endswith(".weight")]
    assert len(norms) == (9 if "gemma3" in str(made) else 5) + (4 if "gemma3" in str(made) else 0)
    for name, slope in slopes.items():
        scale = float(mx.abs(slope).max())
        assert scale > 0, name
        # float32 sums in another order
        assert float(mx.abs(found[name] - slope).max()) < 2e-4 * scale, name
    got = np.mean([predictions.loss(*training._heads(w), states(training, w), WINDOW // 4) for w in which])
    assert got == pytest.approx(float(loss), rel=1e-5 if scored == 1 else 0.2)


def states(training: Distillation, w: int) -> mx.array:
    h = training._student.embedded(training._windows[w : w + 1])
    for number in range(len(training._student.blocks)):
        training._adopt(number)
        h = training._student.forward(number, h)
    training._adopt(-1)
    return h


def slopes_of(training: Distillation, which: list[int] | None = None) -> dict[str, mx.array]:
    """The slopes with every group and norm moved a little."""
    training._find_targets()
    mx.random.seed(1)
    for part in training._parts:
        for name, value in part.values.items():
            part.values[name] = value + 0.05 * mx.random.normal(value.shape)
    training._student.thresholds = dict.fromkeys(training._student.layers, 0.3)
    draw = np.random.default_rng(0)
    return {name: slope for _, some in training.slopes(which or [4, 2], draw) for name, slope in some.items()}


@pytest.mark.parametrize("which", ["small", "gpu", "numpy"])
def test_slopes_are_the_same_in_other_circumstances(which, llama, tmp_path, monkeypatch):
    """With little room nothing is held or kept, and texts and logits go in pieces; a GPU computes by MLX, and
    a CPU without the extension by numpy alone.
    """
    want = slopes_of(distillation(llama, llama / "model", tmp_path / "one"))
    if which == "gpu":
        monkeypatch.setattr(many_rows, "on_cpu", lambda: False)
        for name in ("rms_norm", "rope"):
            monkeypatch.setattr(mx.fast, name, hooks_cpu.STOCK[name])
    elif which == "numpy":
        monkeypatch.setattr(cpu, "status", lambda: (False, "not built"))
        monkeypatch.setattr(cpu, "slopes", None)
    else:
        for limit in ("HELD_BYTES", "KEPT_BYTES", "CHUNK_BYTES"):
            monkeypatch.setattr(student, limit, {"cpu": 0})
        monkeypatch.setattr(predictions, "PIECE_BYTES", 5 * 4 * 512)
    found = slopes_of(distillation(llama, llama / "model", tmp_path / "two"))
    for name, slope in want.items():
        assert mx.allclose(found[name], slope, rtol=1e-3, atol=2e-4 * float(mx.abs(slope).max())), name


def test_a_part_of_the_positions_stands_for_all():
    weight = predictions.weights(64, 16)
    sums = np.zeros_like(weight)
    for seed in range(400):
        found = predictions.drawn(weight, 16, 0.5, np.random.default_rng(seed))
        assert np.count_nonzero(found[:16]) == 4
        assert np.count_nonzero(found[16:]) == 24
        for some in (slice(0, 16), slice(16, None)):
            assert found[some].sum() == pytest.approx(weight[some].sum(), rel=1e-5)
        sums += found
    assert np.allclose(sums / 400, weight, rtol=0.2)
    assert np.array_equal(predictions.drawn(weight, 16, 1.0, np.random.default_rng(0)), weight)


def test_logits_that_forbid_tokens():
    rng = np.random.default_rng(0)
    wanted, got = (rng.normal(size=(1, 3, 6)).astype(np.float32) for _ in range(2))
    allowed = slice(0, 4)
    weight = np.array([1, 2, 3], np.float32)
    few = predictions.Reference(mx.array(wanted[..., allowed]), weight)
    want, (slope,) = mx.vjp(few.divergence, [mx.array(got[..., allowed])], [mx.array(1.0)])
    wanted[..., 4:] = got[..., 4:] = -np.inf
    reference = predictions.Reference(mx.array(wanted), weight)
    value, (found,) = mx.vjp(reference.divergence, [mx.array(got)], [mx.array(1.0)])
    assert float(value[0]) == pytest.approx(float(want[0]), rel=1e-5)
    assert mx.allclose(found[..., allowed], slope, atol=1e-6)
    assert mx.array_equal(found[..., 4:], mx.zeros((1, 3, 2)))


def test_model_is_nearer_to_its_source_and_sound(made, tmp_path):
    found = run(made, tmp_path, options=replace(OPTIONS, steps=40))
    assert found.kept
    assert "fell from" in found.line()
    assert found.last < 0.985 * found.first
    folder = Folder(tmp_path / "model")
    folder.verify()
    assert weights(tmp_path) != (made / "model" / "model.safetensors").read_bytes()
    before, after = (mx.load(str(f / "model" / "model.safetensors")) for f in (made, tmp_path))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} >= {"scales", "biases", "weight"}
    assert not any(before[name].dtype == mx.uint32 for name in changed), "codes stay"
    assert any("norm" in name for name in changed)


def test_killed_run_goes_on_byte_equal(llama, tmp_path):
    run(llama, tmp_path / "whole")
    steps = []

    def stop(done, total, what):
        if "training" in what:
            steps.append(done)
            if done in (5, 8) and steps.count(done) == 1:
                raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            run(llama, tmp_path / "killed", stop)
    steps.clear()
    run(llama, tmp_path / "killed", lambda done, _, what: steps.append(done) if "training" in what else None)
    assert steps == [6, 7, 8, 9]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_damaged_state_is_not_taken_up(llama, tmp_path):
    run(llama, tmp_path / "whole")

    def stop(done, total, what):
        if "training" in what and done == 5:
            raise Stop

    with pytest.raises(Stop):
        run(llama, tmp_path / "killed", stop)
    state = next((tmp_path / "killed" / "states").glob("distilling-3-1.npy"))
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    run(llama, tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_killed_while_it_writes(llama, tmp_path, monkeypatch):
    run(llama, tmp_path / "whole")
    write, count = WeightsFile.write, []

    def stop(self, name, array):
        count.append(name)
        if len(count) == 7:
            raise Stop
        write(self, name, array)

    monkeypatch.setattr(WeightsFile, "write", stop)
    with pytest.raises(Stop):
        run(llama, tmp_path / "killed")
    monkeypatch.undo()
    run(llama, tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    next((tmp_path / "killed" / "states").glob("final-*.npy")).unlink()
    with pytest.raises(SpqtError, match="damaged"):
        run(llama, tmp_path / "killed")


def test_no_gain_leaves_the_model_as_it_was(llama, tmp_path, monkeypatch):
    losses = iter([1.0, 1.0])
    monkeypatch.setattr(Distillation, "_held_out_loss", lambda self: next(losses))
    assert "stay as they were" in run(llama, tmp_path).line()
    Folder(tmp_path / "model").verify()
    before, after = (mx.load(str(f / "model" / "model.safetensors")) for f in (llama, tmp_path))
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_scales_that_overflow(llama, tmp_path):
    with pytest.raises(SpqtError, match="does not fit float16"):
        run(llama, tmp_path, options=Options(steps=3, rate=1e9))


def test_targets_of_rounding_are_taken_over(llama, tmp_path):
    """The first windows' states lie there by chunks; the others are passed through the source."""
    whole = distillation(llama, llama / "model", tmp_path / "one")
    whole._find_targets()
    want = [whole._store.load(f"target-{w}") for w in range(9)]
    part = distillation(llama, llama / "model", tmp_path / "two")
    for c, rows in enumerate([(0, 1, 2), (3, 4), (5,)]):
        part._store.save(f"source-2-{c}", mx.concatenate([want[w] for w in rows]))
    part._find_targets()
    for w, states in enumerate(want):
        assert mx.allclose(part._store.load(f"target-{w}"), states, atol=1e-5)


def test_blocks_that_are_no_chain(llama, tmp_path, monkeypatch):
    from mlx_lm.models import llama as family

    call = family.TransformerBlock.__call__
    monkeypatch.setattr(family.TransformerBlock, "__call__", lambda *a, **k: (call(*a, **k), 1))
    with pytest.raises(UnsupportedError, match="more than"):
        run(llama, tmp_path)
    assert not list((tmp_path / "states").glob("*")), "refused before any work"


def test_one_text_is_too_few(llama, tmp_path):
    with pytest.raises(SpqtError, match="too few"):
        distillation(llama, llama / "model", tmp_path / "states", windows_of(1))


def test_rates_rise_and_fall(llama, tmp_path):
    training = distillation(
        llama, llama / "model", tmp_path / "states", windows_of(9), options=Options(steps=100)
    )
    rates = [training._rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 * (1 / 20 + 0.02), rel=0.01)
    assert max(rates) == rates[19]
    assert rates[-1] < 0.021e-3
    seen = [w for step in range(4) for w in training._batch(step)]
    assert sorted(seen) == list(range(8)), "all windows but the held out come before one comes again"
    assert distill.HELD_OUT == 8
