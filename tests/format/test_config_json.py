"""config.json of any model: what can't be read is refused, and a write is whole or not at all."""

import json
import os

import pytest

from spqt_cli.errors import ResourceError, SpqtError
from spqt_cli.format import config_json


def test_what_is_no_model_folder(tmp_path):
    (tmp_path / "file").touch()
    for name, cause in (("nowhere", "is not found"), ("file", "is no folder"), ("", r"has no config\.json")):
        with pytest.raises(SpqtError, match=cause):
            config_json.read_config(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' * 100000, "\ud800"])
def test_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpqtError, match=r"config\.json"):
        config_json.read_config(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    config_json.write_config(tmp_path, {"a": 1})
    before = (tmp_path / "config.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="full"):
        config_json.write_config(tmp_path, {"a": 2})
    assert (tmp_path / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_quantization_is_mirrored_as_mlx_lm_writes_it(tmp_path):
    config_json.write_config(tmp_path, {"quantization": {"bits": 4}})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"] == written["quantization"]
