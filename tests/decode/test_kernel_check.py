"""A model's kernels are compiled and checked when it is loaded.

Contract: what one-row steps, prompts of one token, and two to 64 rows launch afterwards was judged during the
load, for every layer kind; on CUDA all but the kernels for more rows; the model then starts as if it had
not run; a refused kernel is known when the load ends; backends that compile nothing run nothing.
"""

import dataclasses

import mlx.core as mx
import pytest

from spqt_cli.backends import select
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, plans, ways
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import fused, kernel_check, phase, session
from spqt_cli.decode.layers import zigzag_layers
from tests.conftest import tiny_checkpoint
from tests.lib.backends import EMULATED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A calibrated model whose layers take one launch or two."""
    root = tmp_path_factory.mktemp("checked")
    sizes = {"hidden_size": 128, "intermediate_size": 8256, "head_dim": 32}
    source = tiny_checkpoint(root / "source", "llama", **sizes)
    convert.convert(str(source), root / "model", convert.ConvertOptions(bits=4, group_size=32))
    options = calibrate.CalibrateOptions(sparsity=0.4, tokens=256, method="uniform")
    calibrate.calibrate(root / "model", options, lambda *_: None)
    return root / "model"


@pytest.fixture
def device(monkeypatch):
    """A GPU whose kernels give zeros; returns (kernels judged, kernels launched)."""
    judged, launched = set(), set()

    def run(launch, inputs):
        launched.add(launch.kernel)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)]

    def verdict(kernels, fault_of):
        judged.update(kernels)
        return ""

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(first_use, "_verdict", verdict)
    monkeypatch.setattr(ways, "best", lambda *_: "few")
    monkeypatch.setattr(plans, "device_class", lambda: "g")
    monkeypatch.setattr(select, "backend", lambda: dataclasses.replace(EMULATED, check=gpu.check))
    return judged, launched


def runs(model):
    """One row as a prompt and as decode steps, and two to 64 rows as both."""
    from mlx_lm.models.cache import make_prompt_cache

    for count in (1, 2, 3, 4, 8, 13, 40, 64):
        tokens, cache = mx.ones((1, count), mx.int32), make_prompt_cache(model)
        mx.eval(model(tokens, cache=cache))
        with phase.decoding():
            for _ in range(2):
                mx.eval(model(tokens, cache=cache))


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_is_launched_later_that_was_not_judged_at_load(folder, device, dense):
    judged, launched = device
    loaded = session.load(folder, dense=dense)
    assert judged
    known = set(judged)
    launched.clear()
    runs(loaded.model)
    assert {one.name.split("_")[1] for one in launched} >= {"gemv", "reduce", "rows"}
    assert launched <= known


def test_a_model_that_mlx_lm_loads_is_checked_too(folder, device):
    import mlx_lm

    judged, _ = device
    mlx_lm.load(str(folder))
    assert {one.name.split("_")[1] for one in judged} >= {"gemv", "reduce", "rows"}


def test_more_rows_wait_for_their_first_use_on_cuda(folder, device, monkeypatch):
    judged, _ = device
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    session.load(folder)
    tokens = {dict(one.constants)["TOKENS"] for one in judged if "TOKENS" in dict(one.constants)}
    assert tokens == {2}  # of the two tokens that every load tries the model's code on


def test_the_first_token_prepares_as_if_nothing_had_run(folder, device, monkeypatch):
    loaded = session.load(folder)
    steps = [one.__dict__[fused.BLOCK] for one in loaded.model.modules() if fused.BLOCK in one.__dict__]
    assert steps
    assert all(step._form == () for step in steps)
    assert all(layer.shared_input._step is None for layer in zigzag_layers(loaded.model).values())


def test_a_refused_kernel_is_known_when_the_load_ends(folder, device, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(first_use, "_refused", {})
    monkeypatch.setattr(first_use, "_passed", set)
    monkeypatch.setattr(first_use, "_remember", lambda key: None)
    monkeypatch.setattr(ways, "best", lambda *_: "quantized")
    monkeypatch.setattr(plans, "device_class", lambda: "g")
    monkeypatch.setattr(select, "backend", lambda: dataclasses.replace(EMULATED, check=gpu.check))

    def refuse(launch, inputs):
        raise RuntimeError("the system refuses it")

    monkeypatch.setattr(launching, "run", refuse)
    model = session.load(folder).model
    found = first_use.refused()
    assert found
    assert capsys.readouterr().err.count("the system refuses it") == len(found)
    with phase.decoding():
        assert not mx.isnan(model(mx.ones((1, 1), mx.int32))).any().item()  # by MLX's own matmul
    assert first_use.refused() == found  # and nothing was tried that the load had not


def test_a_backend_without_kernels_of_its_own_runs_nothing(folder, monkeypatch):
    model = session.load(folder).model
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    monkeypatch.setattr(launching, "run", lambda *_: pytest.fail("launched"))
    assert kernel_check.check(model) == []
