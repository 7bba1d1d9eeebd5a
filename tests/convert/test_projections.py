"""Bits and group of single projections, and those of embedding and head, from convert to decoding."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from spqt_cli.backends.gpu import launch as launching
from spqt_cli.calibrate import calibrate
from spqt_cli.cli import describe, presets
from spqt_cli.convert import convert
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.decode import phase, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import SpqtError
from spqt_cli.format import config_json, layout
from spqt_cli.format.folder import Folder
from tests.cli.test_commands import process
from tests.lib.converting import contents, interrupted

OWN = (("k_proj", 8, 64), ("self_attn.q_proj", 6, 32), ("down_proj", 8, 32))
MIXED = ConvertOptions(group_size=32, head_bits=8, projections=OWN)
PLAIN = ConvertOptions(group_size=32)
BLOCK = "model.layers.1"


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with four kinds of layers, calibrated; shared: don't write to it."""
    output = tmp_path_factory.mktemp("mixed") / "out"
    convert.convert(str(checkpoint), output, MIXED)
    calibrate.calibrate(output, calibrate.CalibrateOptions(sparsity=0.4, tokens=1024), lambda *_: None)
    return output


def kind(folder: Path, path: str) -> tuple[int, int]:
    entry = config_json.read_config(folder)["quantization"][f"{BLOCK}.{path}"]
    return entry["bits"], entry["group_size"]


def test_each_projection_has_its_own_bits_and_group(mixed: Path, checkpoint: Path) -> None:
    kinds = {"self_attn.k_proj": (8, 64), "self_attn.q_proj": (6, 32), "self_attn.v_proj": (4, 32)}
    kinds |= {"mlp.down_proj": (8, 32), "mlp.up_proj": (4, 32)}
    source, written = (
        mx.load(str(checkpoint / "model.safetensors")),
        mx.load(str(mixed / "model.safetensors")),
    )
    for path, (bits, group_size) in kinds.items():
        assert kind(mixed, path) == (bits, group_size)
        name = f"{BLOCK}.{path}"
        w = source[f"{name}.weight"]
        parts = layout.quantize(w, bits, group_size, layout.band_of(w.shape[0], group_size))
        for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert mx.array_equal(written[f"{name}.{leaf}"], part), name


def test_embedding_keeps_its_own_bits(mixed: Path) -> None:
    assert config_json.read_config(mixed)["quantization"]["model.embed_tokens"]["bits"] == 8
    assert session.load(mixed).model.model.embed_tokens.bits == 8


def test_dry_run_knows_the_size(checkpoint: Path, mixed: Path, tmp_path: Path) -> None:
    result = convert.convert(
        str(checkpoint), tmp_path / "out", ConvertOptions(**{**vars(MIXED), "dry_run": True})
    )
    shard = mixed / "model.safetensors"
    assert result.bytes == shard.stat().st_size - 8 - int.from_bytes(shard.read_bytes()[:8], "little")
    assert result.layers == 14


def test_inspect_and_verify(mixed: Path) -> None:
    assert Folder(mixed).verify() == ["model.safetensors"]
    summary = describe.describe(str(mixed))
    assert summary.kinds == {
        "4 bits, group 32": 8, "6 bits, group 32": 2, "8 bits, group 32": 2, "8 bits, group 64": 2
    }  # fmt: skip
    assert summary.own == {"8 bits, group 32": 1}
    assert "6 bits, group 32" in summary.text()
    assert "own: 1 x 8 bits, group 32" in summary.text()


def test_settings_are_part_of_the_identity(mixed: Path, converted: Path, tmp_path: Path) -> None:
    before, after = (config_json.read_config(folder)["spqt"]["fingerprint"] for folder in (converted, mixed))
    assert before != after
    edited = shutil.copytree(mixed, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    config["quantization"][f"{BLOCK}.self_attn.k_proj"]["bits"] = 4
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpqtError, match="edited after conversion"):
        session.load(edited)


def test_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    interrupted(checkpoint, tmp_path / "a" / "out", 9, MIXED)
    assert convert.convert(str(checkpoint), tmp_path / "a" / "out", MIXED).resumed == 9
    convert.convert(str(checkpoint), tmp_path / "b" / "out", MIXED)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


@pytest.mark.parametrize("other", [PLAIN, ConvertOptions(**{**vars(MIXED), "head_bits": 4})])
def test_other_settings_do_not_resume(tmp_path: Path, checkpoint: Path, other: ConvertOptions) -> None:
    interrupted(checkpoint, tmp_path / "out", 9, MIXED)
    assert convert.convert(str(checkpoint), tmp_path / "out", other).resumed == 0


def test_siblings_of_different_bits_decode_as_each_alone(mixed: Path) -> None:
    loaded = session.load(mixed)
    layers = zigzag_layers(loaded.model)
    x = mx.random.normal((1, 1, 64), key=mx.random.key(0))
    for siblings in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        for path in siblings:
            layer = layers[f"{BLOCK}.{path}"]
            masked, w = layout.mask(x, layer.threshold), layer.dequantized()
            # A float32 sum of 64 products is off by at most 64 roundings of the sum of their sizes; each w is
            # code * scale + bias, the two up to |w| + |bias| and |bias|, which kernels may sum apart.
            sizes = mx.abs(w) + 2 * mx.abs(layer["biases"]).max()
            bound = 64 * 2.0**-23 * (mx.abs(masked) @ sizes.T)
            with phase.decoding():
                found = layer(x)
            assert (mx.abs(found - masked @ w.T) <= bound).all().item()


def test_gpu_launches_differ_where_bits_or_group_do(mixed: Path) -> None:
    layers = zigzag_layers(session.load(mixed).model)
    q, k, v = (layers[f"{BLOCK}.self_attn.{name}_proj"] for name in "qkv")
    assert not launching.one_launch([q, k, v])
    assert not launching.one_launch([k, layers[f"{BLOCK}.mlp.down_proj"]])
    assert launching.one_launch([v, layers[f"{BLOCK}.mlp.up_proj"]])


def test_mlx_lm_runs_it(mixed: Path) -> None:
    result = process("mlx-lm", "generate", "--model", mixed, "--prompt", "fox", "--max-tokens", "4")
    assert result.returncode == 0, result.stderr.decode()
    assert b"tokens-per-sec" in result.stdout


def test_preset_file_and_flag_through_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(
        "[quantization]\ngroup_size = 32\nhead_bits = 8\n"
        "[projections]\nk_proj = {bits = 8, group_size = 64}\n"
    )
    for flags, head in (((), 8), (("--head-bits", "5"), 5)):
        output = tmp_path / f"out{head}"
        result = process("convert", checkpoint, "-o", output, "--preset", preset, *flags)
        assert result.returncode == 0, result.stderr.decode()
        quantization = config_json.read_config(output)["quantization"]
        assert quantization["model.embed_tokens"]["bits"] == head
        assert kind(output, "self_attn.k_proj") == (8, 64)
        assert kind(output, "self_attn.q_proj") == (4, 32)


@pytest.mark.parametrize(
    "line",
    ["k_proj = 8", "k_proj = {bits = 8}", "k_proj = {bits = 8, group_size = 64, band = 1}", "k_proj = {}",
     "k_proj = {bits = true, group_size = 64}", 'k_proj = {bits = "8", group_size = 64}'],
)  # fmt: skip
def test_mistaken_line_in_a_preset_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[projections]\n{line}\n")
    with pytest.raises(SpqtError, match="k_proj") as caught:
        presets.load_preset(str(path))
    assert caught.value.exit_code == 3
