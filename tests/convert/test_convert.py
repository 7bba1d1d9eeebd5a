"""What convert writes: tensors, config, small files; values that it refuses; dry runs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from spqt_cli.convert import convert, encode, shards
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.decode import hooks
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import SpqtError, UnsupportedError, UsageError
from spqt_cli.format import config_json, contract, layout
from spqt_cli.format.folder import Folder
from tests.conftest import tiny_checkpoint
from tests.lib.converting import OPTIONS, change, run, run_path


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), [(4, 64, None), (3, 32, "bfloat16"), (8, 128, "float16")]
)
def test_every_tensor_is_the_quantized_source(
    tmp_path: Path, arch: str, bits: int, group_size: int, dtype: str | None
) -> None:
    source, output = tiny_checkpoint(tmp_path / "m", arch), tmp_path / "out"
    convert.convert(str(source), output, ConvertOptions(bits, group_size, dtype))
    written = mx.load(str(output / "model.safetensors"))
    entries = contract.entries(config_json.read_config(output))
    for name, array in mx.load(str(source / "model.safetensors")).items():
        wanted = array.astype(getattr(mx, dtype or "float32"))
        path = name.removesuffix(".weight")
        if path in entries:
            band = entries[path]["spqt"]["band"]
            parts = layout.quantize(wanted, bits, group_size, band)
        elif f"{path}.scales" in written:  # embedding and head: 5 bits at least
            parts = mx.quantize(wanted, group_size, max(bits, 5))
        else:
            parts = (wanted,)
        names = [name] if len(parts) == 1 else [f"{path}.{leaf}" for leaf in ("weight", "scales", "biases")]
        for part_name, part in zip(names, parts, strict=True):
            assert written[part_name].dtype == part.dtype
            assert mx.array_equal(written.pop(part_name), part), part_name
    assert not written


def test_mlx_lm_loads_the_same_weights(converted: Path, checkpoint: Path) -> None:
    import mlx_lm.utils

    hooks.install()
    model, _ = mlx_lm.utils.load_model(converted)
    layers = zigzag_layers(model)
    assert len(layers) == 14
    original = mx.load(str(checkpoint / "model.safetensors"))
    for path, layer in layers.items():
        # one step of 4 bits is a fifteenth of a group's range; rounding the edge may add as much again
        error = mx.abs(layer.dequantized() - original[f"{path}.weight"]).max().item()
        assert error <= 2 * mx.abs(layer.scales).max().item()
    assert dict(tree_flatten(model.parameters()))["model.norm.weight"].size == 64


def test_fault_37_plain_mlx_lm_refuses_loudly(converted: Path) -> None:
    code = f"import mlx_lm; mlx_lm.load({str(converted)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "spqt" in done.stderr.splitlines()[-1]


def test_shards_are_readable_and_aligned(converted: Path) -> None:
    path = converted / "model.safetensors"
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:start])
    assert header.pop("__metadata__")["format"] == "mlx"
    for entry in header.values():
        width = {"U32": 4, "F32": 4}[entry["dtype"]]
        assert (start + entry["data_offsets"][0]) % width == 0
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(json.loads((converted / config_json.INDEX).read_text())["weight_map"])


def test_config_of_the_output(converted: Path) -> None:
    config = config_json.read_config(converted)
    assert config["quantization"] == config["quantization_config"]
    entry = config["quantization"]["model.layers.0.mlp.up_proj"]
    assert entry == {
        "bits": 4,
        "group_size": 32,
        "mode": "zigzag",
        contract.NEEDS: True,
        "spqt": {"band": 160},
    }
    section = config["spqt"]
    assert section["format_version"] == 1
    assert section["fingerprint"] == contract.settings_fingerprint(config)
    assert set(section["shards"]) == {"model.safetensors"}
    assert section["source"]["name"] == "tiny-llama"


def test_several_shards(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mx.load(str(run_path(checkpoint, tmp_path / "whole") / "model.safetensors"))
    monkeypatch.setattr(shards, "LARGEST_SHARD", 30_000)
    output = run_path(checkpoint, tmp_path / "out")
    names = sorted(path.name for path in output.iterdir() if path.suffix == ".safetensors")
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    together: dict[str, mx.array] = {}
    for name in names:
        together |= mx.load(str(output / name))
    assert together.keys() == whole.keys()
    assert all(mx.array_equal(together[name], whole[name]) for name in whole)
    assert Folder(output).verify() == names


def test_two_runs_are_byte_equal(tmp_path: Path, checkpoint: Path) -> None:
    first = run(checkpoint, tmp_path / "a" / "out")
    time.sleep(0.01)
    assert run(checkpoint, tmp_path / "b" / "out") == first


def test_small_files_go_along_and_code_does_not(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    for name in ("chat_template.jinja", "generation_config.json", "LICENSE", "session.py", "tokenization.py"):
        (source / name).write_text("{}")
    names = set(run(source, tmp_path / "out"))
    assert {
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "tokenizer.json",
        "README.md",
    } <= names
    assert not {name for name in names if name.endswith(".py")}


def test_fault_60_odd_paths(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "mödel [1] *  é" / "sou rce")
    output = tmp_path / "出力 [a-b] ?" / ("long" * 40)
    assert "config.json" in run(source, output)
    assert Folder(output).tensors


def test_default_output(tmp_path: Path) -> None:
    assert convert.default_output("org/Name-1B", ConvertOptions(bits=6)) == Path("Name-1B-spqt-6bit")
    assert convert.default_output(str(tmp_path / "a.gguf"), OPTIONS) == Path("a-spqt-4bit")
    assert convert.default_output(f"{tmp_path}/", OPTIONS) == Path(f"{tmp_path.name}-spqt-4bit")


# Values of weights


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_fault_19_nan_and_inf_are_named(tmp_path: Path, bad: float, name: str) -> None:
    source = tiny_checkpoint(tmp_path / "m", dtype=mx.bfloat16)
    array = mx.load(str(source / "model.safetensors"))[name]
    array[..., -1] = bad
    change(source, name, array)
    with pytest.raises(SpqtError, match=name) as caught:
        run(source, tmp_path / "out")
    assert type(caught.value) is SpqtError
    assert not (tmp_path / "out").exists()


def test_finite_search_sees_every_element() -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        array = mx.full((encode.CHECKED_AT_ONCE + 7,), mx.finfo(dtype).max, dtype)
        assert encode.is_finite(array)
        assert encode.is_finite(-array)
        for position in (0, encode.CHECKED_AT_ONCE - 1, encode.CHECKED_AT_ONCE, array.size - 1):
            for bad in (float("nan"), float("inf"), float("-inf")):
                changed = mx.array(array)
                changed[position] = bad
                assert not encode.is_finite(changed)


def test_fault_20_weights_beyond_float16(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj.weight"
    change(source, name, mx.full((64, 64), 1e6))
    with pytest.raises(SpqtError, match=f"{name} does not fit float16"):
        run(source, tmp_path / "out", ConvertOptions(group_size=32, dtype="float16"))
    run(source, tmp_path / "out", ConvertOptions(group_size=32, dtype="bfloat16"))


def test_fault_20_largest_float16_weights(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m", dtype=mx.float16, torch_dtype="float16")
    name = "model.layers.0.self_attn.q_proj.weight"
    signs = mx.array(np.random.default_rng(0).choice([-65504.0, 65504.0], (64, 64)), mx.float16)
    change(source, name, signs)
    output = run_path(source, tmp_path / "out")
    scales = mx.load(str(output / "model.safetensors"))[name.replace("weight", "scales")]
    assert mx.isfinite(scales).all()


def test_fault_21_zero_groups_stay_exact(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    path = "model.layers.0.mlp.up_proj"
    array = mx.load(str(source / "model.safetensors"))[f"{path}.weight"]
    array[:32] = 0
    change(source, f"{path}.weight", array)
    written = mx.load(str(run_path(source, tmp_path / "out") / "model.safetensors"))
    parts = [written[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases")]
    back = layout.dequantize(*parts, outputs=160, bits=4, group_size=32)
    assert mx.array_equal(back[:32], mx.zeros((32, 64)))


def test_fault_23_ragged_outputs(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m", intermediate_size=150)
    path = "model.layers.0.mlp.up_proj"
    original = mx.load(str(source / "model.safetensors"))[f"{path}.weight"]
    written = mx.load(str(run_path(source, tmp_path / "out") / "model.safetensors"))
    parts = [written[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases")]
    back = layout.dequantize(*parts, outputs=150, bits=4, group_size=32)
    assert mx.abs(back - original).max().item() <= 2 * mx.abs(parts[1]).max().item()


@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions(bits=7),
        ConvertOptions(group_size=16),
        ConvertOptions(dtype="int8"),
        ConvertOptions(head_bits=7),
        ConvertOptions(head_bits=0),
        ConvertOptions(projections=(("k_proj", 9, 64),)),
        ConvertOptions(projections=(("k_proj", 8, 48),)),
    ],
)
def test_fault_27_bad_settings(tmp_path: Path, checkpoint: Path, options: ConvertOptions) -> None:
    with pytest.raises(UsageError):
        run(checkpoint, tmp_path / "out", options)


# Dry runs and quantized sources


def test_dry_run_writes_nothing_and_knows_the_size(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    result = convert.convert(str(checkpoint), output, ConvertOptions(group_size=32, dry_run=True))
    assert list(tmp_path.iterdir()) == []
    run(checkpoint, output)
    size = (output / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((output / "model.safetensors").read_bytes()[:8], "little")
    assert result.bytes == size - header
    assert result.layers == 14
    assert "mlp.up_proj" in result.summary()


@pytest.mark.parametrize("bits", [2, 3])
def test_too_few_bits_are_warned_of(tmp_path: Path, checkpoint: Path, bits: int) -> None:
    options = ConvertOptions(bits, 32, dry_run=True)
    (warning,) = convert.convert(str(checkpoint), tmp_path / "out", options).warnings
    assert warning.startswith(f"{bits}-bit Zigzag loses more")
    assert "--q-bits 4" in warning


def test_four_bits_are_not_warned_of(tmp_path: Path, checkpoint: Path) -> None:
    options = ConvertOptions(4, 32, dry_run=True)
    assert convert.convert(str(checkpoint), tmp_path / "out", options).warnings == []


def stock_quantized(checkpoint: Path, output: Path, **options: Any) -> Path:
    """The checkpoint as mlx-lm itself quantizes it."""
    from mlx_lm.convert import convert as stock

    stock(str(checkpoint), str(output), quantize=True, q_group_size=32, **options)
    return output


def test_fault_26_quantized_source(tmp_path: Path, checkpoint: Path) -> None:
    source = stock_quantized(checkpoint, tmp_path / "m [8bit]", q_bits=8)
    with pytest.raises(UnsupportedError) as caught:
        run(source, tmp_path / "out")
    assert "--allow-requantize" in caught.value.hint
    mx.save_safetensors(str(source / "model-stale.safetensors"), {"stale": mx.zeros(4)})
    run(source, tmp_path / "out", ConvertOptions(group_size=32, allow_requantize=True))
    assert Folder(tmp_path / "out").verify()
    again = mx.load(str(tmp_path / "out" / "model.safetensors"))
    stored = mx.load(str(source / "model.safetensors"))
    path = "model.layers.0.mlp.up_proj"
    wide = mx.dequantize(*(stored[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases")), 32, 8)
    wanted = layout.quantize(wide, 4, 32, 160)
    assert mx.array_equal(again[f"{path}.weight"], wanted[0])


def test_fault_26_converted_source(tmp_path: Path, converted: Path) -> None:
    with pytest.raises(UnsupportedError, match="already a converted model"):
        run(converted, tmp_path / "out", ConvertOptions(allow_requantize=True))
