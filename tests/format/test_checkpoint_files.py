"""Hostile and damaged sources are refused by name before MLX opens a shard (faults 1 to 18)."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.convert import convert, source
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files
from spqt_cli.format.config_json import INDEX
from spqt_cli.format.folder import Folder
from tests.conftest import tiny_checkpoint

SHARD = "model.safetensors"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A writable copy of the tiny checkpoint."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a shard."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write(path: Path, header: dict[str, Any], data: bytes) -> None:
    write_raw(path, json.dumps(header).encode(), data)


def refused(folder: Path, *words: str, kind: type[SpqtError] = SpqtError) -> SpqtError:
    """Opening the folder must fail with exactly this kind of error, whose cause holds the words."""
    with pytest.raises(SpqtError) as caught:
        source.open_source(str(folder), None, source.Trust())
    assert type(caught.value) is kind
    for word in words:
        assert word in caught.value.cause
    return caught.value


def split(folder: Path) -> dict[str, str]:
    """Split the shard in two with an index; tensor -> shard."""
    weights = mx.load(str(folder / SHARD))
    names = sorted(weights)
    weight_map = {}
    for i, group in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in group})
        weight_map |= dict.fromkeys(group, shard)
    (folder / SHARD).unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("content", [b"", b"\x10\0\0"], ids=["empty", "three_bytes"])
def test_fault_01_shard_too_short(folder: Path, content: bytes) -> None:
    (folder / SHARD).write_bytes(content)
    refused(folder, SHARD)


@pytest.mark.parametrize("lost", [1, 1000])
def test_fault_02_truncated_data(folder: Path, lost: int) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - lost)
    refused(folder, SHARD)


@pytest.mark.parametrize("length", [0, 1 << 40, 100_000_001, (1 << 64) - 1])
def test_fault_03_header_length(folder: Path, length: int) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, SHARD)


def test_fault_03_header_that_fills_the_memory(folder: Path) -> None:
    with (folder / SHARD).open("wb") as file:  # sparse: takes no disk
        file.write(struct.pack("<Q", 90_000_000) + b"{")
        file.truncate(90_000_100)
    refused(folder, SHARD, "too long")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_fills_the_memory(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(1 << 33)
    refused(folder, name, "too l")


@pytest.mark.parametrize(
    "header", [b'{"a\xff": 1}', b"[1, 2]", b'"text"', b"[" * 100_000, b'{"a":' * 100_000, b"{}}"]
)
def test_fault_04_header_is_no_object(folder: Path, header: bytes) -> None:
    write_raw(folder / SHARD, header)
    refused(folder, SHARD)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{ENTRY},"a":{ENTRY}}}',
        f'{{"a":{ENTRY},"\\u0061":{ENTRY}}}',
        f'{{"a":{ENTRY},"a":{{"dtype":"F32","shape":[1],"data_of\\u0066sets":[0,4]}}}}',
        f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ENTRY}}}',
        f'{{"__metadata__":{{"a":"1"}},"a":{ENTRY},"a":{ENTRY}}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":{"x":1,"x":2}}}',
    ],
)
def test_fault_05_duplicate_key(folder: Path, header: str) -> None:
    """The library keeps the last of two."""
    write_raw(folder / SHARD, header.encode(), b"\0" * 4)
    refused(folder, SHARD, "a name occurs twice")


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{ENTRY}}}',
        f'{{"\\u0061":{ENTRY}}}',
        f'{{"data_offsets":{ENTRY}}}',
        f'{{"__metadata__":{{}},"a":{ENTRY}}}   ',
        f'{{"__metadata__":{{"x":"{{\\"a\\":1}}"}},"a":{ENTRY}}}',
    ],
)
def test_odd_names_that_occur_once(tmp_path: Path, header: str) -> None:
    write_raw(tmp_path / SHARD, header.encode(), b"\0" * 4)
    assert len(checkpoint_files.read_shard(tmp_path / SHARD, SHARD)[0]) == 1


def test_fault_06_overlap_hole_trailing(folder: Path) -> None:
    header, data = parts(folder / SHARD)
    names = [name for name in header if name != "__metadata__"]
    first, second = sorted(names, key=lambda name: header[name]["data_offsets"])[:2]
    overlap = {**header, second: {**header[second], "data_offsets": header[first]["data_offsets"]}}
    hole = {
        name: {**entry, "data_offsets": [offset + 4 for offset in entry["data_offsets"]]}
        for name, entry in header.items()
        if name != "__metadata__"
    }
    for changed, content in ((overlap, data), (hole, b"\0" * 4 + data), (header, data + b"\0" * 8)):
        write(folder / SHARD, changed, content)
        refused(folder, SHARD)


@pytest.mark.parametrize("shape", [[-4, 4], [2.5, 4], [1 << 40, 1 << 40], [65536] * 4, ["4", 4], [1 << 70]])
def test_fault_07_impossible_dims(folder: Path, shape: list[Any]) -> None:
    write(folder / SHARD, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"")
    refused(folder, SHARD)


@pytest.mark.parametrize(("dtype", "size"), [("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F99", 4)])
def test_fault_08_dtype_is_named(folder: Path, dtype: str, size: int) -> None:
    header, data = parts(folder / SHARD)
    header["odd.weight"] = {"dtype": dtype, "shape": [1], "data_offsets": [len(data), len(data) + size]}
    write(folder / SHARD, header, data + b"\0" * size)
    refused(folder, "odd.weight", dtype, kind=UnsupportedError)


def test_fault_09_index_missing(folder: Path) -> None:
    split(folder)
    (folder / INDEX).unlink()
    refused(folder, INDEX)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\0"])
def test_fault_09_index_bad(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


@pytest.mark.parametrize("name", ["/etc/model.safetensors", "../model.safetensors", "a/../../b.safetensors"])
def test_fault_10_index_leaves_the_model(folder: Path, name: str) -> None:
    write_index(folder, {"model.norm.weight": name})
    refused(folder, name)


def test_fault_10_link_leaves_the_model(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (folder / SHARD).rename(outside)
    (folder / SHARD).symlink_to(outside)
    refused(folder, SHARD, "link")


def test_fault_10_links_of_the_hub_cache_are_allowed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert source.open_source(str(snapshot), None, source.Trust()).tensors


def test_fault_11_missing_shard(folder: Path) -> None:
    gone = next(iter(split(folder).values()))
    (folder / gone).unlink()
    refused(folder, gone, "missing")


def test_fault_12_stale_shard_is_ignored_with_a_warning(folder: Path) -> None:
    split(folder)
    mx.save_safetensors(str(folder / "model-00009-of-00009.safetensors"), {"stale": mx.zeros(4)})
    checkpoint = source.open_source(str(folder), None, source.Trust())
    assert "stale" not in checkpoint.tensors
    assert "model-00009-of-00009.safetensors" in checkpoint.warnings[0]


def test_fault_13_tensor_in_two_shards(folder: Path) -> None:
    weight_map = split(folder)
    first, second = sorted(set(weight_map.values()))
    twice = next(name for name, shard in weight_map.items() if shard == first)
    weights = mx.load(str(folder / second)) | {twice: mx.zeros(4)}
    mx.save_safetensors(str(folder / second), weights)
    refused(folder, twice, "two shards")


def test_fault_14_index_and_shards_differ(folder: Path) -> None:
    weight_map = split(folder)
    name = next(iter(weight_map))
    write_index(folder, {key: value for key, value in weight_map.items() if key != name})
    refused(folder, name)
    other = next(shard for shard in weight_map.values() if shard != weight_map[name])
    write_index(folder, weight_map | {name: other})
    refused(folder, name)


UNUSED = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("name", [UNUSED, "model.layers.0.attn.masked_bias", "lm_head.weight"])
def test_an_index_may_name_what_the_model_does_not_need(folder: Path, tmp_path: Path, name: str) -> None:
    """Here a llama model whose head is tied."""
    weight_map = split(folder)
    write_index(folder, weight_map | {name: next(iter(weight_map.values()))})
    result = convert.convert(str(folder), tmp_path / "out", convert.ConvertOptions(group_size=32))
    assert [line for line in result.warnings if name in line]
    assert Folder(tmp_path / "out").verify()


def test_fault_14_a_needed_tensor_that_only_the_index_has(folder: Path, tmp_path: Path) -> None:
    weight_map = split(folder)
    lost = "model.layers.1.mlp.up_proj.weight"
    shard = folder / weight_map[lost]
    mx.save_safetensors(str(shard), {k: v for k, v in mx.load(str(shard)).items() if k != lost})
    with pytest.raises(SpqtError, match=f"tensors are missing: {lost}"):
        convert.convert(str(folder), tmp_path / "out", convert.ConvertOptions(group_size=32))
    assert not (tmp_path / "out").exists()


def test_fault_14_a_head_that_is_lost_is_not_replaced_by_the_embedding(folder: Path) -> None:
    weight_map = split(folder)
    write_index(folder, weight_map | {"lm_head.weight": next(iter(weight_map.values()))})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    refused(folder, "lm_head.weight")


def test_fault_14_a_converted_folder_is_held_to_its_index(converted: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(converted, copied)
    index = json.loads((copied / INDEX).read_text())
    index["weight_map"][UNUSED] = next(iter(index["weight_map"].values()))
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(SpqtError, match="the index names tensors that no shard has"):
        Folder(copied)


def test_fault_14_at_most_ten_names() -> None:
    text = checkpoint_files.named(f"tensor{i:02d}" for i in range(25))
    assert text.count("tensor") == 10
    assert "15 more" in text


def test_fault_17_lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "download it again" in refused(folder, SHARD, "LFS").hint


def test_fault_17_web_page(folder: Path) -> None:
    (folder / SHARD).write_text("\n<!DOCTYPE html><html><title>404</title></html>")
    assert "download it again" in refused(folder, SHARD, "web page").hint


def test_fault_18_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / SHARD).unlink()
    # the pickle of os.system("touch canary"), by hand
    (folder / "pytorch_model.bin").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    refused(folder, "pytorch_model.bin", kind=UnsupportedError)
    assert not canary.exists()


def test_no_weights_at_all(folder: Path) -> None:
    (folder / SHARD).unlink()
    refused(folder, "no model*.safetensors")


def test_header_agrees_with_mlx(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "qwen2", dtype=mx.bfloat16)
    tensors, _ = checkpoint_files.read_shard(folder / SHARD, SHARD)
    loaded = mx.load(str(folder / SHARD))
    assert {name: (t.shape, t.nbytes) for name, t in tensors.items()} == {
        name: (array.shape, array.nbytes) for name, array in loaded.items()
    }
