"""A .gguf file converts to the very weights that its HF original converts to."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from spqt_cli.convert import convert, parameters, source
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format.folder import Folder
from spqt_cli.system import files
from tests.conftest import ARCHITECTURES, random_weights, tiny_checkpoint, tiny_config
from tests.lib.converting import OPTIONS, contents, interrupted
from tests.lib.writing_gguf import write_model


def gguf_of(folder: Path, arch: str) -> Path:
    """The tiny model of an architecture as a float16 .gguf file."""
    config = tiny_config(arch)
    weights = {
        name: np.array(array, np.float32) for name, array in random_weights(config, 0, mx.float16).items()
    }
    return write_model(folder / f"{arch}.gguf", arch, config, weights, kind=GGMLQuantizationType.F16)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_same_weights_as_the_original(tmp_path: Path, arch: str) -> None:
    original = tiny_checkpoint(tmp_path / "hf", arch, dtype=mx.float16, torch_dtype="float16")
    convert.convert(str(original), tmp_path / "a", OPTIONS)
    convert.convert(str(gguf_of(tmp_path, arch)), tmp_path / "b", OPTIONS)
    assert Folder(tmp_path / "b").verify()
    a, b = (mx.load(str(tmp_path / name / "model.safetensors")) for name in "ab")
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        assert mx.array_equal(array, b[name]), name
    names = contents(tmp_path / "b").keys()
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "README.md"} <= names
    assert (
        json.loads((tmp_path / "b" / "config.json").read_text())["spqt"]["source"]["name"] == f"{arch}.gguf"
    )


def test_neighbours_of_the_file_stay_behind(tmp_path: Path) -> None:
    path = gguf_of(tmp_path, "llama")
    (tmp_path / "LICENSE").write_text("of something else")
    convert.convert(str(path), tmp_path / "out", OPTIONS)
    assert "LICENSE" not in contents(tmp_path / "out")


def test_resume(tmp_path: Path) -> None:
    path = gguf_of(tmp_path, "llama")
    convert.convert(str(path), tmp_path / "whole", OPTIONS)
    interrupted(path, tmp_path / "out", 5)
    assert files.work_folders(tmp_path / "out")
    assert convert.convert(str(path), tmp_path / "out", OPTIONS).resumed == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nan_is_named(tmp_path: Path) -> None:
    config, name = tiny_config("llama"), "model.layers.1.mlp.up_proj.weight"
    weights = {key: np.array(array) for key, array in random_weights(config, 0).items()}
    weights[name][3, 5] = np.nan
    path = write_model(tmp_path / "m.gguf", "llama", config, weights)
    with pytest.raises(SpqtError, match=name):
        convert.convert(str(path), tmp_path / "out", OPTIONS)


def test_rearranging_sanitize_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins have no values, so a tensor that mlx-lm would compute from them can't be right."""
    from mlx_lm.models import llama

    monkeypatch.setattr(
        llama.Model, "sanitize", lambda self, w: {k: v + 1 if "norm" in k else v for k, v in w.items()}
    )
    checkpoint = source.open_source(str(gguf_of(tmp_path, "llama")), None, source.Trust())
    with pytest.raises(UnsupportedError, match="rearrange"):
        parameters.load(checkpoint)


def test_bfloat16_is_cast_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "READ_AT_ONCE", 300)  # 64 columns: 4 rows at once, the last piece is short
    config = tiny_config("llama")
    weights = {name: np.array(array) for name, array in random_weights(config, 0).items()}
    path = write_model(tmp_path / "m.gguf", "llama", config, weights, kind=GGMLQuantizationType.BF16)
    checkpoint = source.open_source(str(path), None, source.Trust())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        read = checkpoint.read(name)
        assert read.dtype == mx.bfloat16
        assert mx.array_equal(read, mx.array(checkpoint.gguf.read(name)).astype(mx.bfloat16))
