"""The parts of a split .gguf file are one model, whichever is named; what is missing or mixed is named."""

import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from spqt_cli.convert import source
from spqt_cli.errors import SpqtError
from tests.conftest import random_weights, tiny_config
from tests.lib.converting import run
from tests.lib.writing_gguf import add_plain_tokenizer, add_sizes, stored, write_file, write_model

PARTS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, and beside it the same model split as llama.cpp's gguf-split does."""
    folder = tmp_path_factory.mktemp("split")
    config = tiny_config("llama")
    weights = {k: np.array(v) for k, v in random_weights(config, 1, mx.float16).items()}
    path = write_model(folder / "tiny.gguf", "llama", config, weights)
    tensors = [stored("llama", config, name, weight) for name, weight in weights.items()]
    for number in range(PARTS):
        writer = GGUFWriter(folder / part(number), "llama")
        if number == 0:
            writer.add_type("model")
            add_sizes(writer, "llama", config)
            add_plain_tokenizer(writer, config["vocab_size"])
        else:
            writer.kv_data = [{}]  # the later parts have nothing but split.*
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", PARTS)
        writer.add_int32("split.tensors.count", len(tensors))
        for name, values in tensors[number * 8 : (number + 1) * 8 if number + 1 < PARTS else None]:
            writer.add_tensor(name, values)
        write_file(writer, folder / part(number))
    assert "general.architecture" not in GGUFReader(folder / part(1)).fields
    return path


def part(number: int) -> str:
    return f"tiny-{number + 1:05d}-of-{PARTS:05d}.gguf"


def copied(whole: Path, folder: Path) -> Path:
    for number in range(PARTS):
        shutil.copy(whole.with_name(part(number)), folder)
    return folder


def refusal(path: Path) -> SpqtError:
    with pytest.raises(SpqtError) as caught:
        source.open_source(str(path), None, source.Trust())
    return caught.value


@pytest.mark.parametrize("number", range(PARTS))
def test_any_part_stands_for_the_model(whole: Path, tmp_path: Path, number: int) -> None:
    one = run(whole, tmp_path / "one")
    joined = run(whole.with_name(part(number)), tmp_path / "joined")
    assert one["tokenizer.json"] == joined["tokenizer.json"]
    first, second = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("one", "joined"))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]).item() for name in first)


def test_the_result_does_not_depend_on_the_part_that_was_named(whole: Path, tmp_path: Path) -> None:
    first = run(whole.with_name(part(0)), tmp_path / "a")
    last = run(whole.with_name(part(2)), tmp_path / "b")
    assert first == last


@pytest.mark.parametrize("number", range(PARTS))
def test_missing_part_is_named(whole: Path, tmp_path: Path, number: int) -> None:
    folder = copied(whole, tmp_path)
    (folder / part(number)).unlink()
    error = refusal(folder / part((number + 1) % PARTS))
    assert error.exit_code == 3
    assert re.search(f"{part(number)} is missing, part {number + 1} of {PARTS}", error.cause)


def test_part_under_another_name(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    (folder / part(1)).rename(folder / "second.gguf")
    assert "part 2 of 3" in refusal(folder / "second.gguf").cause
    (folder / "second.gguf").rename(folder / part(0))  # in the place of the first
    assert "part 2 of 3" in refusal(folder / part(0)).cause


def test_parts_of_different_models(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    shutil.copy(folder / part(1), folder / part(2))
    assert f"{part(2)} says that it is part 2 of 3, not 3 of 3" in refusal(folder / part(0)).cause


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("split.no", -1, "split.no"),
        ("split.count", "3", "split.count"),
        ("split.tensors.count", 7, "not 7"),
    ],
)
def test_keys_that_can_not_be(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, said: str
) -> None:
    from spqt_cli.convert.gguf import split

    read = split.read_header

    def changed(path: Path) -> Any:
        header = read(path)
        header.metadata[key] = value
        return header

    monkeypatch.setattr(split, "read_header", changed)
    error = refusal(whole.with_name(part(0)))
    assert error.exit_code == 3
    assert said in error.cause
