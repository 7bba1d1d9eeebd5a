"""`spqt fuse`: the folder is the model with the adapter, up to one more rounding; whole or not there."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.adapt import fuse as fuser
from spqt_cli.decode import session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import BusyError, SpqtError
from spqt_cli.format import layout
from spqt_cli.format.folder import Folder
from tests.conftest import tiny_checkpoint
from tests.decode.test_generate import dequantized_copy
from tests.lib import adapters
from tests.lib.converting import contents, leftovers, run_path
from tests.lib.mixture import PROJECTIONS, tiny_mixture

KINDS = ("lora", "dora")


def written(converted, folder, kind, keys=None):
    """(the folder of a random adapter, mlx-lm's model of plain layers that has it)."""
    plain = dequantized_copy(session.load(converted, dense=True))
    return adapters.write(folder, plain, kind, keys), plain


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_both_rounded_once(calibrated, tmp_path, kind):
    adapter, plain = written(calibrated, tmp_path / "adapter", kind, ["self_attn.q_proj", "mlp.down_proj"])
    before = contents(calibrated)
    result = fuser.fuse(str(calibrated), adapter, tmp_path / "out")
    assert (result.layers, result.had_thresholds) == (4, True)
    assert contents(calibrated) == before
    assert leftovers(tmp_path) == []
    fused, origin = (session.load(one, dense=True).model for one in (result.output, calibrated))
    layers, old, wanted = zigzag_layers(fused), zigzag_layers(origin), dict(plain.named_modules())
    for path, layer in layers.items():
        if path.endswith(("q_proj", "down_proj")):
            exact = wanted[path].fuse().weight  # by mlx-lm
            rounded = layout.quantize(exact, layer.bits, layer.group_size, layer.band)
            form = {"outputs": layer.outputs, "bits": layer.bits, "group_size": layer.group_size}
            off = np.abs(np.array(layer.dequantized() - layout.dequantize(*rounded, **form)))
            assert (off < 1e-4).mean() > 0.999  # sums in another order: a code may tip over
            assert not np.array_equal(np.array(layer.weight), np.array(old[path].weight))
        else:
            assert np.array_equal(np.array(layer.weight), np.array(old[path].weight))


def test_the_folder_is_sound_and_says_what_it_is(calibrated, tmp_path):
    adapter, _ = written(calibrated, tmp_path / "adapter", "lora")
    output = fuser.fuse(str(calibrated), adapter, tmp_path / "out").output
    folder = Folder(output)
    assert folder.verify() == list(folder.shards)
    assert folder.calibration is None
    assert folder.config["spqt"]["adapter"] == {"kind": "lora", "layers": 14}
    assert (output / "README.md").read_text().endswith("A lora adapter was fused into 14 of its layers.\n")
    assert folder.weights_fingerprint != Folder(calibrated).weights_fingerprint
    assert "calibrate again" in fuser.FuseResult(output, 14, True).summary()


def test_heads_embeddings_and_biases(tmp_path):
    """Row-grouped parts by mlx-lm's own fuse, in the layout that they have."""
    converted = run_path(tiny_checkpoint(tmp_path / "source", "qwen2", dtype=mx.bfloat16), tmp_path / "base")
    keys = ["lm_head", "model.embed_tokens", "self_attn.q_proj"]
    adapter, plain = written(converted, tmp_path / "adapter", "lora", keys)
    output = fuser.fuse(str(converted), adapter, tmp_path / "out").output
    tokens = mx.array([[5, 9, 200, 31]])
    base, both = (session.load(folder, dense=True).model for folder in (converted, output))
    exact, bare, fused = (np.array(model(tokens)) for model in (plain, base, both))
    assert np.linalg.norm(fused - exact) < 0.4 * np.linalg.norm(bare - exact)
    stored = {name: tensor.dtype for name, tensor in Folder(output).tensors.items()}
    assert stored == {name: tensor.dtype for name, tensor in Folder(converted).tensors.items()}


def test_experts(tmp_path):
    """A mixture's experts have adapters of their own: the model with them, and what they are fused into."""
    converted = run_path(tiny_mixture(tmp_path / "source"), tmp_path / "base")
    keys = [f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
    adapter, plain = written(converted, tmp_path / "adapter", "lora", keys)
    tokens = mx.array([[5, 9, 200, 31]])
    exact = np.array(plain(tokens))
    adapted = session.load(converted, dense=True, adapter_path=str(adapter)).model
    bare = session.load(converted, dense=True).model
    assert np.allclose(np.array(adapted(tokens)), exact, atol=1e-4)
    result = fuser.fuse(str(converted), adapter, tmp_path / "out")
    assert result.layers == len(PROJECTIONS)
    fused, wanted = zigzag_layers(session.load(result.output, dense=True).model), dict(plain.named_modules())
    for path in PROJECTIONS:
        layer = fused[path]
        form = {"outputs": layer.outputs, "bits": layer.bits, "group_size": layer.group_size}
        rounded = layout.quantize(wanted[path].fuse().weight, layer.bits, layer.group_size, layer.band)
        off = np.abs(np.array(layer.dequantized() - layout.dequantize(*rounded, **form)))
        assert (off < 1e-4).mean() > 0.999
    assert np.linalg.norm(np.array(bare(tokens)) - exact) > 0.01


def test_nothing_is_written_where_it_fails(converted, tmp_path, monkeypatch):
    adapter, _ = written(converted, tmp_path / "adapter", "lora")
    monkeypatch.setattr(fuser, "_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fuser.fuse(str(converted), adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_output_that_is_there_is_kept(converted, tmp_path):
    adapter, _ = written(converted, tmp_path / "adapter", "lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for output in (tmp_path / "out", converted):
        with pytest.raises(BusyError):
            fuser.fuse(str(converted), adapter, output)


def test_numbers_that_are_none(converted, tmp_path):
    adapter, _ = written(converted, tmp_path / "adapter", "lora", ["self_attn.q_proj"])
    shard = str(adapter / "adapters.safetensors")
    mx.save_safetensors(shard, {name: array * mx.nan for name, array in mx.load(shard).items()})
    with pytest.raises(SpqtError, match="NaN or infinite"):
        fuser.fuse(str(converted), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_weights_are_no_adapter_to_fuse(converted, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    norm = {"model.norm.weight": mx.ones((64,))}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), norm)
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": -1}))
    with pytest.raises(SpqtError, match="holds whole weights"):
        fuser.fuse(str(converted), adapter, tmp_path / "out")
    loaded = session.load(converted, adapter_path=str(adapter))
    assert (np.array(loaded.model.model.norm.weight) == 1).all()


def test_a_fused_folder_is_not_fitted_to_a_source_that_lacks_the_adapter(converted, checkpoint, tmp_path):
    from spqt_cli.fit import fit
    from spqt_cli.fit.options import FitOptions

    adapter, _ = written(converted, tmp_path / "adapter", "lora", ["self_attn.q_proj"])
    output = fuser.fuse(str(converted), adapter, tmp_path / "out").output
    with pytest.raises(SpqtError, match="holds an adapter"):
        fit.fit(output, str(checkpoint), tmp_path / "fitted", FitOptions(), lambda *_: None)


def test_fusing_twice(converted, tmp_path):
    """What was fused is a converted folder like any other."""
    adapter, _ = written(converted, tmp_path / "adapter", "lora", ["self_attn.q_proj"])
    once = fuser.fuse(str(converted), adapter, tmp_path / "once").output
    twice = fuser.fuse(str(once), adapter, tmp_path / "twice").output
    assert Folder(twice).verify()
    shutil.rmtree(once)
    assert session.load(twice).model is not None
