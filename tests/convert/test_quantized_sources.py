"""Sources in 8 and 4 bits, converted whole: FP8, GPTQ and the like become Zigzag, mxfp4 experts stay."""

import gc
import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.cli import describe
from spqt_cli.convert import convert, source
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import config_json, layout
from spqt_cli.format.folder import Folder
from tests.conftest import SIZES, random_weights, tiny_checkpoint, tiny_config, write_tokenizer
from tests.lib.converting import OPTIONS, config_of, interrupted, run

ALLOWED = ConvertOptions(group_size=32, allow_requantize=True)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPT_OSS = {
    **SIZES, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": 4,
    "num_experts_per_tok": 2, "intermediate_size": 96, "sliding_window": 16, "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"], "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
Stored = dict[str, mx.array | tuple[str, mx.array]]


def write(path: Path, tensors: Stored) -> None:
    """A shard; (dtype, bytes) declares a dtype that MLX does not write."""
    names = {mx.float32: "F32", mx.bfloat16: "BF16", mx.uint8: "U8", mx.int32: "I32"}
    header: dict[str, Any] = {}
    data = b""
    for name, one in tensors.items():
        dtype, array = one if isinstance(one, tuple) else (names[one.dtype], one)
        raw = bytes(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)))
        header[name] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def folder_of(folder: Path, config: dict[str, Any], tensors: Stored) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / "model.safetensors", tensors)
    write_tokenizer(folder)
    return folder


def fp8(weight: mx.array, rows: int, columns: int) -> tuple[mx.array, mx.array, np.ndarray]:
    """Bytes, scales of blocks, and the values that they stand for, by a loop over the blocks."""
    found = np.array(weight.astype(mx.float32))
    height, width = -(-found.shape[0] // rows), -(-found.shape[1] // columns)
    scales, codes = np.zeros((height, width), np.float32), np.zeros(found.shape, np.uint8)
    for i in range(height):
        for j in range(width):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = np.abs(found[at]).max() / 448
            codes[at] = np.array(mx.to_fp8(mx.array(found[at] / scales[i, j])))
            found[at] = E4M3[codes[at]] * scales[i, j]
    return mx.array(codes), mx.array(scales), found


def _e4m3() -> np.ndarray:
    """The 256 values of E4M3, from its definition."""
    code = np.arange(256)
    exponent, mantissa, sign = (code >> 3) & 15, code & 7, np.where(code >> 7, -1.0, 1.0)
    value = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    return sign * np.where((code & 127) == 127, np.nan, value)


E4M3 = _e4m3()


def fp8_folder(
    folder: Path, block: tuple[int, int], suffix: str = "_scale_inv", quantization: Any = FP8
) -> tuple[Path, Path]:
    """A checkpoint whose linear layers are FP8, and the same with what they stand for, in bfloat16."""
    settings = tiny_config("llama", torch_dtype="bfloat16", hidden_size=192, intermediate_size=160)
    packed: Stored = {}
    plain: Stored = {}
    for name, weight in random_weights(settings, 3, mx.bfloat16).items():
        packed[name] = plain[name] = weight
        if name.endswith("proj.weight"):
            codes, scales, values = fp8(weight, *block)
            packed |= {name: ("F8_E4M3", codes), f"{name}{suffix}": scales}
            plain[name] = mx.array(values, mx.float32).astype(mx.bfloat16)
            packed[name.replace("weight", "activation_scale")] = mx.array([0.5])
    quantized = settings | {"quantization_config": quantization}
    return folder_of(folder / "fp8", quantized, packed), folder_of(folder / "plain", settings, plain)


def weights_of(folder: Path) -> dict[str, bytes]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return {name: bytes(np.array(array.view(mx.uint8))) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("block", "suffix", "settings"),
    [
        ((128, 128), "_scale_inv", FP8),  # 192 and 160 are no multiples of 128
        ((64, 32), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [64, 32]}),
        ((1, 999), "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ((999, 999), "_scale_inv", {"quant_method": "fp8", "activation_scheme": "static"}),
    ],
)
def test_fp8_equals_the_conversion_of_what_it_stands_for(
    tmp_path: Path, block: tuple[int, int], suffix: str, settings: dict[str, Any]
) -> None:
    packed, plain = fp8_folder(tmp_path, block, suffix, settings)
    result = convert.convert(str(packed), tmp_path / "a", OPTIONS)
    assert any("8 bits" in line for line in result.warnings)
    run(plain, tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    config = config_json.read_config(tmp_path / "a")
    assert config["quantization_config"] == config["quantization"]  # nothing of FP8 is left
    Folder(tmp_path / "a").verify()


def test_fp8_of_ministral_3_is_not_left_to_its_class(tmp_path: Path) -> None:
    """mlx-lm's class multiplies the codes themselves with the scale."""
    packed, plain = fp8_folder(tmp_path, (999, 999))
    rope = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
    for folder in (packed, plain):
        config_of(folder, model_type="ministral3", rope_parameters=rope)
    run(packed, tmp_path / "a")
    run(plain, tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_fp8_interrupted_goes_on(tmp_path: Path) -> None:
    packed, _ = fp8_folder(tmp_path, (128, 128))
    whole = run(packed, tmp_path / "whole")
    interrupted(packed, tmp_path / "out", 5)
    result = convert.convert(str(packed), tmp_path / "out", OPTIONS)
    assert result.resumed == 5
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_fp8_with_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    packed, _ = fp8_folder(tmp_path, (128, 128))
    data = bytearray((packed / "model.safetensors").read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    entry = json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]
    data[8 + length + entry["data_offsets"][0]] = 0x7F  # NaN
    (packed / "model.safetensors").write_bytes(data)
    with pytest.raises(SpqtError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        run(packed, tmp_path / "out")


def test_gptq_asks_for_the_flag_and_converts(tmp_path: Path) -> None:
    """Of weights that GPTQ's 8 bits hold exactly, the conversion is that of the plain model."""
    config = tiny_config("llama", torch_dtype="float16")
    packed: Stored = {}
    plain: Stored = {}
    generator = np.random.default_rng(0)
    for name, weight in random_weights(config, 3, mx.bfloat16).items():
        packed[name] = plain[name] = weight.astype(mx.float32)
        if name.endswith("proj.weight"):
            outputs, inputs = weight.shape
            codes = generator.integers(0, 256, (inputs, outputs)).astype(np.uint8)
            words = codes.reshape(-1, 4, outputs).transpose(0, 2, 1).copy().view(np.int32)[..., 0]
            path = name.removesuffix(".weight")
            packed.pop(name)
            packed |= {
                f"{path}.qweight": mx.array(words),
                f"{path}.qzeros": mx.full((2, outputs // 4), 0x7F7F7F7F, mx.int32),
                f"{path}.scales": mx.full((2, outputs), 2.0**-9, mx.float32),
                f"{path}.g_idx": mx.arange(inputs, dtype=mx.int32) // (inputs // 2),
            }
            plain[name] = mx.array((codes.T.astype(np.float32) - 128) / 512)
    settings = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True}
    quantized = folder_of(tmp_path / "gptq", config | {"quantization_config": settings}, packed)
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(quantized, tmp_path / "a")
    run(quantized, tmp_path / "a", ALLOWED)
    run(folder_of(tmp_path / "plain", config, plain), tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def gpt_oss(folder: Path) -> tuple[Path, dict[str, mx.array]]:
    """A gpt-oss as it is published: experts in mxfp4, gate and up rows in turn."""
    generator = np.random.default_rng(0)
    tensors: Stored = {}
    for name, weight in random_weights(GPT_OSS, 5, mx.bfloat16).items():
        if ".experts." not in name:
            tensors[name] = weight
    width, hidden = GPT_OSS["intermediate_size"], GPT_OSS["hidden_size"]
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        for part, outputs, inputs in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            tensors[f"{path}.{part}_blocks"] = mx.array(
                generator.integers(0, 256, (4, outputs, inputs // 32, 16)).astype(np.uint8)
            )
            tensors[f"{path}.{part}_scales"] = mx.array(
                generator.integers(118, 122, (4, outputs, inputs // 32)).astype(np.uint8)
            )
            tensors[f"{path}.{part}_bias"] = mx.array(generator.normal(size=(4, outputs)) * 0.05).astype(
                mx.bfloat16
            )
    arrays = {name: one for name, one in tensors.items() if isinstance(one, mx.array)}
    return folder_of(folder / "gpt-oss", GPT_OSS, tensors), arrays


def mxfp4(blocks: mx.array, scales: mx.array) -> np.ndarray:
    """float32 values of mxfp4, from its definition: E2M1 numbers times a power of two."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    stored = np.array(blocks)
    codes = np.stack([stored & 15, stored >> 4], -1).reshape(*stored.shape[:-1], 32)
    values = table[codes & 7] * np.where(codes & 8, -1, 1)
    wide = values * 2.0 ** (np.array(scales).astype(np.float64) - 127)[..., None]
    return wide.reshape(*wide.shape[:-2], -1).astype(np.float32)


def logits(network: Any) -> np.ndarray:
    tokens = mx.array([[5, 17, 300, 41, 8, 8, 99, 3, 250, 7, 61, 12]])
    return np.array(network(tokens).astype(mx.float32))


def test_experts_in_mxfp4_stay_byte_for_byte(tmp_path: Path) -> None:
    folder, stored = gpt_oss(tmp_path)
    run(folder, tmp_path / "out")
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    config = config_json.read_config(tmp_path / "out")
    assert isinstance(found, dict)
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        for part, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2)), ("down", slice(None))):
            name = f"{path}.{'down' if part == 'down' else 'gate_up'}_proj"
            blocks = np.array(stored[f"{name}_blocks"])[:, rows]
            scales = np.array(stored[f"{name}_scales"])[:, rows]
            packed = np.array(found[f"{path}.{part}_proj.weight"])
            assert packed.tobytes() == blocks.tobytes()
            assert np.array(found[f"{path}.{part}_proj.scales"]).tobytes() == scales.tobytes()
            entry = config["quantization"][f"{path}.{part}_proj"]
            assert entry == {"mode": "mxfp4", "bits": 4, "group_size": 32}
    assert config["quantization"]["model.layers.0.self_attn.q_proj"]["mode"] == "zigzag"
    assert "experts stay row-grouped" in "\n".join(describe.describe(str(tmp_path / "out")).reads.lines())


def test_experts_in_mxfp4_answer_as_their_definition(tmp_path: Path) -> None:
    """Everything but the experts is the converted model's own; the experts are widened by the definition."""
    from mlx_lm.models.switch_layers import SwitchLinear

    folder, stored = gpt_oss(tmp_path)
    run(folder, tmp_path / "out")
    loaded = session.load(tmp_path / "out")
    found = logits(loaded.model)
    for layer, block in enumerate(loaded.model.layers):
        path = f"model.layers.{layer}.mlp.experts"
        both = mxfp4(stored[f"{path}.gate_up_proj_blocks"], stored[f"{path}.gate_up_proj_scales"])
        down = mxfp4(stored[f"{path}.down_proj_blocks"], stored[f"{path}.down_proj_scales"])
        bias = stored[f"{path}.gate_up_proj_bias"].astype(mx.float32)
        parts = {
            "gate_proj": (both[:, ::2], bias[:, ::2]),
            "up_proj": (both[:, 1::2], bias[:, 1::2]),
            "down_proj": (down, stored[f"{path}.down_proj_bias"].astype(mx.float32)),
        }
        for name, (weight, own) in parts.items():
            plain = SwitchLinear(weight.shape[2], weight.shape[1], 4)
            plain.weight, plain.bias = mx.array(weight), own
            setattr(block.mlp.experts, name, plain)
    wanted = logits(loaded.model)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 0.1


def test_the_same_in_mlx_form_keeps_its_experts(tmp_path: Path) -> None:
    """What mlx-lm's own convert makes of gpt-oss: experts in mxfp4, the rest affine."""
    import mlx.nn as nn
    from mlx_lm.utils import load_model, save_model

    folder, _ = gpt_oss(tmp_path)
    run(folder, tmp_path / "direct")
    network, _ = load_model(folder)
    other = tmp_path / "mlx"
    other.mkdir()
    entries: dict[str, Any] = {"group_size": 32, "bits": 8, "mode": "affine"}
    for path, module in network.named_modules():
        if "scales" in module:
            entries[path] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    nn.quantize(network, 32, 8, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    save_model(other, network)
    config = GPT_OSS | {"quantization": entries, "quantization_config": entries}
    (other / "config.json").write_text(json.dumps(config))
    write_tokenizer(other)
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(other, tmp_path / "out")
    run(other, tmp_path / "out", ALLOWED)
    direct, through = weights_of(tmp_path / "direct"), weights_of(tmp_path / "out")
    kept = [name for name in direct if ".experts." in name]
    assert len(kept) == 2 * 3 * 3
    assert all(direct[name] == through[name] for name in kept)
    session.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_linear_layers_in_mlx_float_modes_are_widened(
    tmp_path: Path, checkpoint: Path, mode: str, group_size: int, bits: int
) -> None:
    """Their values by mx.dequantize, checked here against the definition for mxfp4."""
    weights = mx.load(str(checkpoint / "model.safetensors"))
    assert isinstance(weights, dict)
    packed: Stored = {}
    plain: Stored = dict(weights)
    for name, weight in weights.items():
        packed[name] = weight
        if name.endswith("proj.weight"):
            words, scales = mx.quantize(weight, group_size, bits, mode=mode)
            packed |= {name: ("U32", words), name.replace("weight", "scales"): scales}
            plain[name] = mx.dequantize(words, scales, None, group_size, bits, mode, dtype=mx.float32)
            if mode == "mxfp4":
                blocks = words.view(mx.uint8).reshape(*scales.shape, 16)
                assert np.array_equal(np.array(plain[name]), mxfp4(blocks, scales))
    config = config_json.read_config(checkpoint)
    said = {"quantization": {"group_size": group_size, "bits": bits, "mode": mode}}
    run(folder_of(tmp_path / "packed", config | said, packed), tmp_path / "a", ALLOWED)
    run(folder_of(tmp_path / "plain", config, plain), tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


@pytest.mark.parametrize("name", ["torchao", "hqq", "bitnet", "quanto"])
def test_unsupported_methods_are_named_with_and_without_the_flag(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", quantization_config={"quant_method": name})
    for trust in (source.Trust(), source.Trust(requantize=True)):
        with pytest.raises(UnsupportedError, match=f"quantized by {name}, which spqt can't unpack"):
            source.open_source(str(folder), None, trust)


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Four more layers are 3 MB of FP8 and 6 MB of bfloat16: holding a tenth of them would break this."""
    peaks = []
    for layers in (2, 6):
        sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": layers}
        config = tiny_config("llama", torch_dtype="bfloat16", **sizes)
        packed: Stored = {}
        for name, weight in random_weights(config, 0, mx.bfloat16).items():
            packed[name] = weight
            if name.endswith("proj.weight"):
                packed[name] = ("F8_E4M3", mx.to_fp8(weight))
                packed[f"{name}_scale_inv"] = mx.ones(
                    (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
                )
        folder = folder_of(tmp_path / f"{layers}", config | {"quantization_config": FP8}, packed)
        del packed, weight
        gc.collect()  # what earlier tests left would be freed meanwhile, and the peak seem low
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run(folder, tmp_path / f"{layers}-out")
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < peaks[0] + 0.3e6


def test_fp8_experts_of_deepseek_are_stacked_from_plain_numbers(tmp_path: Path) -> None:
    config = {
        **SIZES, "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "num_experts_per_tok": 2,
        "tie_word_embeddings": False, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "n_routed_experts": 4, "kv_lora_rank": 64, "q_lora_rank": 32, "qk_rope_head_dim": 32,
        "v_head_dim": 32, "qk_nope_head_dim": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    packed: Stored = {}
    plain: Stored = {}
    for name, weight in random_weights(config, 1, mx.bfloat16).items():
        if ".switch_mlp." not in name:
            packed[name] = plain[name] = weight
            continue
        for number, one in enumerate(weight):
            single = name.replace("switch_mlp", f"experts.{number}")
            codes, scales, values = fp8(one, 16, 48)
            packed |= {single: ("F8_E4M3", codes), f"{single}_scale_inv": scales}
            plain[single] = mx.array(values, mx.float32).astype(mx.bfloat16)
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 48]}}
    run(folder_of(tmp_path / "packed", config | said, packed), tmp_path / "a")
    run(folder_of(tmp_path / "plain", config, plain), tmp_path / "b")
    found = weights_of(tmp_path / "a")
    assert found == weights_of(tmp_path / "b")
    assert any(".switch_mlp." in name for name in found)


@pytest.mark.parametrize("whole", [False, True])
def test_experts_in_nvfp4_of_mlx_stay_unless_they_have_a_scale_for_all(tmp_path: Path, whole: bool) -> None:
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import _get_classes

    config = {
        **SIZES, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64, "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model_class, args_class = _get_classes(config)
    network = model_class(args_class.from_dict(config))
    network.load_weights(list(random_weights(config, 2).items()))
    entry = {"group_size": 16, "bits": 4, "mode": "nvfp4"} | ({"global_scale": True} if whole else {})
    chosen = {path: entry for path, one in network.named_modules() if isinstance(one, SwitchLinear)}
    nn.quantize(network, class_predicate=lambda path, _: chosen.get(path, False))
    weights = dict(tree_flatten(network.parameters()))
    folder = tiny_checkpoint(tmp_path / "m")
    said = {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4", **chosen}}
    (folder / "config.json").write_text(json.dumps(config | said))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    run(folder, tmp_path / "out", ALLOWED)
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(found, dict)
    written = config_json.read_config(tmp_path / "out")["quantization"]
    assert np.isfinite(logits(session.load(tmp_path / "out").model)).all()
    if not whole:
        kept = [name for name in weights if ".switch_mlp." in name]
        assert len(kept) == 2 * 3 * 2
        assert all(mx.array_equal(weights[name], found[name]).item() for name in kept)
        assert written["model.layers.0.mlp.switch_mlp.up_proj"] == entry
        return
    for path in chosen:  # MLX multiplies with such a scale on a GPU only: widened, and rounded in groups
        parts = [weights[f"{path}.{leaf}"] for leaf in ("weight", "scales", "global_scale")]
        plain = mx.stack([
            mx.dequantize(w, s, None, 16, 4, "nvfp4", g, mx.float32) for w, s, g in zip(*parts, strict=True)
        ])  # fmt: skip
        original = random_weights(config, 2)[f"{path}.weight"]
        assert mx.abs(plain - original).max() < 0.3 * mx.abs(original).max()
        wanted = layout.quantize(plain, 4, 32, written[path]["spqt"]["band"])
        names = ("weight", "scales", "biases")
        assert all(mx.array_equal(one, found[f"{path}.{n}"]) for one, n in zip(wanted, names, strict=True))
