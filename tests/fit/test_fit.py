"""Fitted folders: nearer to their source, sound, the same after an interruption, for many architectures."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.convert import source_model
from spqt_cli.decode import hooks_cpu, session
from spqt_cli.errors import BusyError, SpqtError, UsageError
from spqt_cli.fit import compress, cost, fit
from spqt_cli.fit.options import TRAINING, FitOptions
from spqt_cli.format.folder import Folder
from spqt_cli.measure import many_rows, probes, scoring
from tests.conftest import tiny_checkpoint
from tests.lib.converting import OPTIONS, Stop, config_of, contents, leftovers

WISHES = FitOptions(own=8, window=64)
TRAINED = FitOptions(method="full", own=48, window=64, steps=60)


class Sizes(NamedTuple):
    """What a layer is to an estimate."""

    inputs: int
    outputs: int


def quiet(*_) -> None:
    pass


def fitted(source: Path, output: Path, options: FitOptions = WISHES, on_progress=quiet) -> fit.FitResult:
    return fit.convert_fitted(str(source), output, OPTIONS, options, on_progress)


@pytest.fixture(scope="module")
def result(checkpoint, tmp_path_factory):
    return fitted(checkpoint, tmp_path_factory.mktemp("fitted") / "model")


def divergence(source: Path, *folders: Path) -> list[float]:
    """KL to the source of each folder's predictions on tokens that nothing was fitted on."""
    tokens = mx.array(np.random.default_rng(7).integers(5, 500, (4, 48)).astype(np.int32))

    def predicted(model):
        logits = probes.continuation(model, tokens, probes.empty_cache(model))
        return scoring.log_probabilities(logits)

    reference = scoring.Reference(predicted(source_model.load(str(source))))
    models = [session.load(folder, dense=True).model for folder in folders]
    return [float(scoring.divergence(reference, predicted(model)).mean()) for model in models]


def test_nearer_to_the_source_than_rounding(result, checkpoint, converted):
    rounded, ours = divergence(checkpoint, converted, result.output)
    assert ours < 0.75 * rounded
    assert result.conversion is not None
    assert result.layers == len(Folder(result.output).layers)
    assert "fitted (gptq) on 8 texts" in result.summary()


def test_by_mlx_as_on_a_gpu(result, checkpoint, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "on_cpu", lambda: False)
    for name in ("rms_norm", "rope"):
        monkeypatch.setattr(mx.fast, name, hooks_cpu.STOCK[name])
    there = fitted(checkpoint, tmp_path / "model").output
    rounded, host, device = divergence(checkpoint, converted, result.output, there)
    assert device < 1.1 * host < rounded  # the text that it draws is another


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    return fitted(checkpoint, tmp_path_factory.mktemp("trained") / "model", TRAINED)


def test_training_comes_nearer_on_texts_held_out(trained, checkpoint, converted):
    said = Folder(trained.output).config["spqt"]["fit"]
    assert said["trained"]
    assert said["loss"][1] < 0.99 * said["loss"][0]
    rounded, ours = divergence(checkpoint, converted, trained.output)
    assert ours < 0.75 * rounded
    assert Folder(trained.output).verify()


def test_the_folder_is_sound_and_says_what_was_done(result, converted):
    folder = Folder(result.output)
    assert folder.verify() == list(folder.shards)
    assert not leftovers(result.output.parent)
    said = folder.config["spqt"]["fit"]
    assert said == {
        "method": "gptq", "windows": 8, "own": 8, "window": 64, "text": result.text_sha256, "seed": 0,
    }  # fmt: skip
    before, after = Folder(converted), folder
    assert after.tensors == before.tensors
    assert after.weights_fingerprint != before.weights_fingerprint


def test_only_zigzag_layers_change(result, converted):
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (converted, result.output))
    zigzag = tuple(f"{path}." for path in Folder(converted).layers)
    for name, array in before.items():
        same = bool(mx.array_equal(array, after[name]).item())
        assert same == (not name.startswith(zigzag)), name


def test_a_converted_folder_becomes_the_same(result, checkpoint, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    fit.fit(tmp_path / "model", str(checkpoint), tmp_path / "out", WISHES, quiet)
    assert contents(tmp_path / "out") == contents(result.output)


def test_resumed_is_byte_equal(result, checkpoint, tmp_path):
    for stage in ("writing text", "fitting blocks"):
        seen = []

        def stop(done: float, total: float, what: str, stage=stage, seen=seen) -> None:
            seen.append(what)
            if what == stage and done:
                raise Stop

        with pytest.raises(Stop):
            fitted(checkpoint, tmp_path / "model", on_progress=stop)
        assert leftovers(tmp_path)
    seen = []
    fitted(checkpoint, tmp_path / "model", on_progress=lambda done, total, what: seen.append((done, what)))
    assert contents(tmp_path / "model") == contents(result.output)
    assert "writing text" not in {what for _, what in seen}
    assert (0, "fitting blocks") not in seen  # the first block was done
    assert not leftovers(tmp_path)


def test_resumed_training_is_byte_equal(trained, checkpoint, tmp_path):
    def stop(done: float, total: float, what: str) -> None:
        if what == "training scales and norms" and done == 25:
            raise Stop

    with pytest.raises(Stop):
        fitted(checkpoint, tmp_path / "model", TRAINED, stop)
    seen = []
    fitted(checkpoint, tmp_path / "model", TRAINED, lambda done, total, what: seen.append((done, what)))
    assert contents(tmp_path / "model") == contents(trained.output)
    assert min(done for done, what in seen if what == "training scales and norms") == 20
    assert "fitting blocks" not in {what for _, what in seen}


def test_a_block_that_was_torn_is_done_again(result, checkpoint, tmp_path):
    def stop(done: float, total: float, what: str) -> None:
        if what == "fitting blocks" and done == 1:
            raise Stop

    with pytest.raises(Stop):
        fitted(checkpoint, tmp_path / "model", on_progress=stop)
    (work,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    shard = work / "model" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000:] = bytes(1000)
    shard.write_bytes(data)
    fitted(checkpoint, tmp_path / "model")
    assert Folder(tmp_path / "model").verify()


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_architectures(tmp_path, arch):
    source = tiny_checkpoint(tmp_path / "source", arch)
    found = fitted(source, tmp_path / "model", FitOptions(own=4, window=32))
    assert Folder(found.output).verify()
    (ours,) = divergence(source, found.output)
    assert np.isfinite(ours)


def test_a_file_of_text_in_place_of_own(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    found = fitted(checkpoint, tmp_path / "model", FitOptions(own=0, data=text, window=64))
    assert found.own == 0
    assert found.windows > 0


def test_the_memory_that_a_fit_takes():
    def memory(source, **wishes):
        options = FitOptions(**wishes).settled()
        layers = {
            "model.layers.0.self_attn.k_proj": Sizes(64, 32),
            "model.layers.0.self_attn.v_proj": Sizes(64, 32),
            "model.layers.1.mlp.up_proj": Sizes(1000, 3000), "lm_head": Sizes(10, 10),
        }  # fmt: skip
        return cost.memory(layers, source, options)

    assert memory(0, own=0, data=Path("text")) == cost.REST + 4 * 2 * 3_000_000
    assert memory(5 << 30, own=3, window=100) == (5 << 30) + 4 * 3 * 100 * 64 + cost.PROCESS
    assert memory(5 << 30, own=0, data=Path("text")) == memory(0, own=3)


def test_what_is_left_open_suits_method_and_device(monkeypatch):
    asked = FitOptions(
        "full", 7, None, 64, 2, 5, 3, rounded_on=6, sparsities=(0.3,), scored=0.2, openings_each=1
    )
    assert asked.settled() == asked
    assert FitOptions().settled().own == 40
    for method, on_cpu in (("gptq", True), ("full", True), ("full", False)):
        monkeypatch.setattr(many_rows, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        found = FitOptions(method=method).settled()
        want = TRAINING["cpu" if on_cpu else "gpu"]
        assert (found.steps, found.batch) == (want.steps, want.batch)
        assert (found.rounded_on, found.sparsities) == (want.rounded_on, want.sparsities)
        assert found.scored == want.scored
        assert found.own == (want.own if method == "full" else 40)
        assert found.openings_each == (want.openings_each if method == "full" else 2)


def test_bad_options(checkpoint, converted, result, tmp_path):
    for options in (
        FitOptions(method="nice"), FitOptions(own=-1), FitOptions(own=0), FitOptions(window=31),
        FitOptions(method="full", steps=0), FitOptions(method="full", batch=0), FitOptions(steps=3),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            fitted(checkpoint, tmp_path / "model", options)
    with pytest.raises(BusyError):
        fitted(checkpoint, result.output)
    other = tiny_checkpoint(tmp_path / "other")
    config_of(other, num_hidden_layers=json.loads((other / "config.json").read_text())["num_hidden_layers"])
    with pytest.raises(SpqtError, match="fitted already"):
        fit.fit(result.output, str(checkpoint), tmp_path / "model", WISHES, quiet)
    wrong = tiny_checkpoint(tmp_path / "wrong", "qwen2")
    with pytest.raises(SpqtError, match="not what"):
        fit.fit(converted, str(wrong), tmp_path / "model", WISHES, quiet)
    assert not leftovers(tmp_path)


def test_layers_with_too_little_text_keep_their_rounding(checkpoint, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "FEWEST", 1e9)
    found = fitted(checkpoint, tmp_path / "model")
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (converted, found.output))
    assert all(bool(mx.array_equal(array, after[name]).item()) for name, array in before.items())
    assert any("plainly rounded" in note for note in found.notes)


def test_window_longer_than_the_context(checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    config_of(source, max_position_embeddings=64)
    found = fitted(source, tmp_path / "model", dataclasses.replace(WISHES, window=512))
    assert Folder(found.output).config["spqt"]["fit"]["window"] == 64
    assert any("64" in note for note in found.notes)
