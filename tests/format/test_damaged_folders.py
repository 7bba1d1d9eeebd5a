"""Converted folders with damaged configs and tokenizers: refused in a line, whatever mlx-lm raises."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spqt_cli.calibrate import calibrate
from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError
from spqt_cli.format import contract
from spqt_cli.format.folder import Folder
from spqt_cli.measure import texts
from tests.lib import damage


@pytest.fixture
def folder(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None), ("hidden_size", 1.5), ("num_attention_heads", {"a": 1}),
        ("rms_norm_eps", None), ("rope_theta", "x"), ("rope_scaling", {"rope_type": "llama3"}),
        ("model_type", []), ("model_type", None), ("eos_token_id", {"a": 1}), ("layer_types", ["x"]),
        ("attention_bias", True), ("num_hidden_layers", 3),
    ],
)  # fmt: skip
def test_fault_15_config_that_mlx_lm_can_not_use(folder: Path, key: str, value: Any) -> None:
    change(folder, lambda config: config.update({key: value}))
    with pytest.raises(SpqtError) as caught:
        session.load(folder)
    assert str(folder) in caught.value.cause
    assert "\n" not in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "{]", "\0" * 100])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_fault_64_tokenizer_damaged_after_conversion(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(SpqtError, match="can't be loaded"):
        session.load(folder)


@pytest.mark.parametrize(
    "curve", [3, 1.5, "x" * 50, {"a": 1}, [0.1], [0.1] * 49 + ["x"], [0.1] * 49 + [1 << 63], [True] * 50]
)
def test_fault_33_curve_of_another_kind_or_length(folder: Path, curve: Any) -> None:
    def edit(config: dict[str, Any]) -> None:
        next(iter(contract.entries(config).values()))["spqt"]["curve"] = curve

    with pytest.raises(SpqtError, match="on a curve"):
        contract.check(change(folder, edit), folder)


@pytest.mark.parametrize("threshold", [1 << 63, 10**400, "0.1", None, [], True])
def test_fault_33_threshold_that_no_float_holds(folder: Path, threshold: Any) -> None:
    def edit(config: dict[str, Any]) -> None:
        next(iter(contract.entries(config).values()))["spqt"]["threshold"] = threshold

    with pytest.raises(SpqtError, match="thresholds must be"):
        contract.check(change(folder, edit), folder)


@pytest.mark.parametrize("share", [None, "0.4", -0.1, 1, float("nan"), True, {}])
def test_fault_33_calibrated_share_is_no_share(folder: Path, share: Any) -> None:
    config = change(folder, lambda config: config["spqt"]["calibration"].update({"sparsity": share}))
    with pytest.raises(SpqtError, match="calibrated for a sparsity"):
        contract.check(config, folder)


def test_damage_stays_in_its_folder(calibrated: Path, tmp_path: Path) -> None:
    """The fuzzer once wrote through its own links, into a file of the machine."""
    sound = {path.name: path.read_bytes() for path in calibrated.iterdir() if path.is_file()}
    outside = tmp_path / "outside"
    outside.write_text("not the model's")
    for seed in range(300):
        folder = tmp_path / f"case-{seed}"
        shutil.copytree(calibrated, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
        damage.damage(folder, random.Random(seed))
        shutil.rmtree(folder)
    assert outside.read_text() == "not the model's"
    assert {path.name: path.read_bytes() for path in calibrated.iterdir() if path.is_file()} == sound


def test_fault_64_tokenizer_of_a_larger_model(folder: Path) -> None:
    """A token that the embedding does not have is refused before MLX sees it."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["f"] = 600
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))
    loaded = session.load(folder)
    with pytest.raises(SpqtError, match="the model has 512"):
        generate.encode(loaded, Prompt("fox", ignore_chat_template=True))
    with pytest.raises(SpqtError, match="the model has 512"):
        calibrate.choose_windows(loaded, texts.read(None), calibrate.CalibrateOptions())


@pytest.mark.parametrize("layers", [1 << 31, 1 << 70])
def test_fault_15_more_layers_than_tensors(folder: Path, layers: Any) -> None:
    """Found by fuzzing: mlx-lm filled the memory with lists of that many layers."""
    change(folder, lambda config: config.update({"num_hidden_layers": layers}))
    with pytest.raises(SpqtError, match="there are only"):
        session.load(folder)


@pytest.mark.parametrize("layers", ["2", None, 2.5])
def test_fault_15_a_layer_count_that_is_no_number(folder: Path, layers: Any) -> None:
    change(folder, lambda config: config.update({"num_hidden_layers": layers}))
    with pytest.raises(SpqtError):
        session.load(folder)


@pytest.mark.parametrize("text_config", [None, 5, {"num_hidden_layers": None}])
def test_a_key_that_the_model_does_not_read_is_not_judged(folder: Path, text_config: Any) -> None:
    """Found by fuzzing: a conversion refused its own output for it."""
    change(folder, lambda config: config.update({"text_config": text_config}))
    Folder(folder)


def test_fault_64_length_of_a_tokenizer_that_is_no_number(folder: Path) -> None:
    """transformers reads it only when it has a text to encode."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(SpqtError, match="can't be loaded"):
        session.load(folder)


def test_template_that_leaves_nothing_of_the_prompt(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ '' }}")
    with pytest.raises(SpqtError, match="leave nothing"):
        generate.encode(session.load(folder), Prompt("hello"))


@pytest.mark.parametrize("context", [1, 2, 31])
def test_context_too_short_to_calibrate(folder: Path, context: int) -> None:
    """Windows of no tokens were cut without end."""
    change(folder, lambda config: config.update(max_position_embeddings=context))
    with pytest.raises(SpqtError, match=f"context of {context} tokens"):
        calibrate.calibrate(folder, calibrate.CalibrateOptions(tokens=256), lambda *_: None)
