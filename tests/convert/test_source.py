"""What may be converted at all: paths, architectures, custom code, tokenizers."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spqt_cli.convert import convert, source
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.errors import ResourceError, SpqtError, UnsupportedError, UsageError
from spqt_cli.format import config_json
from spqt_cli.format.folder import Folder
from tests.conftest import tiny_checkpoint
from tests.lib.converting import OPTIONS, config_of, run

TRUSTING = ConvertOptions(group_size=32, trust_remote_code=True)


def opened(path: Path | str, **trust: bool) -> source.Checkpoint:
    return source.open_source(str(path), None, source.Trust(**trust))


def refusal(path: Path | str, **trust: bool) -> SpqtError:
    with pytest.raises(SpqtError) as caught:
        opened(path, **trust)
    return caught.value


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./nowhere", "nowhere.gguf", "org/name.gguf", ""])
def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(name)
    assert error.exit_code == 3
    assert error.hint


def test_a_class_that_ends_the_process_is_unsupported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "olmo"
    shutil.copytree(checkpoint, folder)
    config_of(folder, model_type="olmo")
    error = refusal(folder)
    assert error.exit_code == 4
    assert "olmo" in error.cause
    assert "ai2-olmo" in error.cause
    assert capsys.readouterr().out == ""


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert refusal(tmp_path / "notes.txt").exit_code == 3


def test_folder_without_config(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path).cause


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"model_type": 3}', "{}", '{"model_type": null}'])
def test_config_is_damaged(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert refusal(tmp_path).exit_code == 3


def test_revision_of_a_path(checkpoint: Path) -> None:
    with pytest.raises(UsageError):
        source.open_source(str(checkpoint), "main", source.Trust())


@pytest.mark.parametrize(
    "model_type", ["no_such_model", "cache", "base", "../llama", "os.path", "llama\n", "llama.Model", "é" * 9]
)
def test_fault_25_unknown_architecture(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedError)
    assert repr(model_type) in error.cause


def test_fault_64_tokenizer_missing(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(folder).cause


@pytest.mark.parametrize(
    "text", ["", "{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}', "\x00"]
)
def test_fault_64_tokenizer_corrupt(tmp_path: Path, text: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refusal(folder).cause


CODE = [
    ("config.json", {"model_file": "evil.py"}),
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
]


@pytest.mark.parametrize(("name", "keys"), CODE)
def test_fault_65_custom_code_is_refused_and_never_run(
    tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    folder, canary = tiny_checkpoint(tmp_path / "m"), tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | keys))
    with pytest.raises(UnsupportedError, match="own code"):
        run(folder, tmp_path / "out")
    written = run(folder, tmp_path / "out", TRUSTING)
    assert not canary.exists()
    assert "evil.py" not in written
    assert not keys.keys() & json.loads(written[name]).keys()


def test_fault_65_the_flag_brings_no_architecture(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config_of(folder, model_type="evil", model_file="evil.py")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert isinstance(refusal(folder, remote_code=True), UnsupportedError)


def test_licence_link_out_of_the_model_is_not_copied(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    assert "LICENSE" not in run(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "keys", [{"quantization": {"bits": 4}}, {"quantization_config": {"quant_method": "awq"}}]
)
def test_fault_26_quantized_by_its_config(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config_of(folder, **keys)
    assert "--allow-requantize" in refusal(folder).hint
    config_of(folder, **dict.fromkeys(keys), text_config=keys)
    assert "--allow-requantize" in refusal(folder).hint


def test_fault_26_quantization_mlx_lm_can_not_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config_of(folder, quantization_config={"quant_method": "compressed-tensors", "format": "nonsense"})
    with pytest.raises(SpqtError):
        run(folder, tmp_path / "out", ConvertOptions(group_size=32, allow_requantize=True))


def test_dtype_of_the_config_is_followed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", torch_dtype="bfloat16")
    convert.convert(str(folder), tmp_path / "out", OPTIONS)
    assert config_json.read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    assert Folder(tmp_path / "out").tensors["model.norm.weight"].dtype == "BF16"


def test_card_keeps_the_licence(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\nevil: !!python/name:os\n---\n# x\n"
    )
    assert "license" not in run(folder, tmp_path / "a")["README.md"].decode()  # unsafe YAML is not read
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [x]\n---\n# x\n")
    card = run(folder, tmp_path / "b")["README.md"].decode()
    assert 'license: "apache-2.0"' in card
    assert 'language: ["en", "de"]' in card


@pytest.mark.parametrize("line", ["{new}: &{new} [{aliases}]", "{new}: &{new} {{'<<': [{aliases}]}}"])
def test_card_whose_aliases_multiply(tmp_path: Path, line: str) -> None:
    """Each line stands for ten times the values of the one before: writing them out never ended."""
    folder = tiny_checkpoint(tmp_path / "m")
    lines = ["a: &a {x: 1}" if "<<" in line else "a: &a [x]"]
    for old, new in pairwise("abcdefghijkl"):
        lines.append(line.format(new=new, aliases=", ".join([f"*{old}"] * 10)))
    (folder / "README.md").write_text("\n".join(["---", *lines, "license: *l", "---", "# x\n"]))
    assert "license" not in run(folder, tmp_path / "out")["README.md"].decode()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "x.jinja", "README.md"]
)
def test_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert name in refusal(folder).cause


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.rename(folder, odd)
    assert "not UTF-8" in refusal(odd).cause
    os.rename(odd, folder)
    with pytest.raises(ResourceError, match="not UTF-8"):
        run(folder, Path(odd))
    (folder / config_json.INDEX).write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    assert "no text" in refusal(folder).cause


def test_texts_of_a_config_need_not_be_valid(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config_of(folder, note="\ud800", other="é")
    assert json.loads(run(folder, tmp_path / "out")["config.json"])["other"] == "é"


def test_unreadable_tokenizer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "LICENSE").touch()
    opening = Path.open

    def refusing(self: Path, *args: Any, **kw: Any) -> Any:
        if self == folder / "LICENSE":  # root may read anything, so pretend
            raise PermissionError(13, "Permission denied")
        return opening(self, *args, **kw)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(SpqtError, match="LICENSE can't be read"):
        run(folder, tmp_path / "out")
