"""Weights that other libraries packed, held against those libraries' own unpacking (tests/data/packed)."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from spqt_cli.convert.unpack import codes, methods
from spqt_cli.convert.unpack.packed import Source
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files
from tests import ROOT

DATA = ROOT / "tests" / "data" / "packed"


def cases() -> list[tuple[str, str]]:
    found = []
    for path in sorted(DATA.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found += [(path.name, case) for case in sorted(file.metadata())]
    return found


def stored(
    name: str, case: str
) -> tuple[dict[str, mx.array], dict[str, checkpoint_files.Tensor], dict[str, Any]]:
    """A case's tensors and headers under the names that a checkpoint has, and its quantization_config."""
    path = DATA / name
    declared, metadata = checkpoint_files.read_shard(path, name, checkpoint_files.EIGHT_BITS)
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mine = [key for key in declared if key.startswith(f"{case}.")]
    named = {key: "x." + key.removeprefix(f"{case}.") for key in mine}
    tensors = {named[key]: declared[key] for key in mine}
    return {named[key]: arrays[key] for key in mine}, tensors, json.loads(metadata[case])


def source_of(
    arrays: dict[str, mx.array],
    tensors: dict[str, checkpoint_files.Tensor],
    settings: dict[str, Any],
    **more: Any,
) -> Source:
    return Source("here", settings, tensors, lambda name: np.array(arrays[name]), **more)


def test_every_library_has_its_fixture() -> None:
    assert {name for name, _ in cases()} == {
        "awq.safetensors", "bitsandbytes.safetensors", "compressed_tensors.safetensors", "gptq.safetensors",
        "modelopt.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "case"), cases())
@pytest.mark.parametrize("at_once", [codes.AT_ONCE, 200])
def test_values_are_the_librarys_own(
    monkeypatch: pytest.MonkeyPatch, name: str, case: str, at_once: int
) -> None:
    monkeypatch.setattr(codes, "AT_ONCE", at_once)  # pieces of a few rows must join to the same
    arrays, tensors, settings = stored(name, case)
    expected = arrays.pop("x.expected")
    tensors.pop("x.expected")
    found, useless = methods.find(source_of(arrays, tensors, settings, dtype=expected.dtype), "llama")
    assert [one.name for one in found] == ["x.weight"]
    assert {*found[0].stored, *useless} == set(tensors)
    value = found[0].read(arrays)
    assert value.shape == expected.shape
    error = mx.abs(value.astype(mx.float32) - expected.astype(mx.float32))
    # the libraries round products to the scales' dtype, some of them a factor before: one rounding apart
    steps = {mx.float16: 2**-11, mx.bfloat16: 2**-8, mx.float32: 2**-22}
    step = max(steps[value.dtype], steps[expected.dtype])
    assert (error <= step * mx.abs(expected.astype(mx.float32)) + 1e-9).all().item()
    assert mx.abs(value.astype(mx.float32)).max().item() > 0.05


def changed(name: str, case: str, **changes: checkpoint_files.Tensor | None) -> SpqtError:
    """What is said of a case after some of its headers were changed (leaf -> Tensor, None takes it out)."""
    arrays, tensors, settings = stored(name, case)
    tensors.pop("x.expected")
    for leaf, tensor in changes.items():
        if tensor is None:
            tensors.pop(f"x.{leaf}")
        else:
            tensors[f"x.{leaf}"] = tensor
    with pytest.raises(SpqtError) as caught:
        methods.find(source_of(arrays, tensors, settings), "llama")
    return caught.value


@pytest.mark.parametrize(
    ("name", "case", "leaf"),
    [
        ("gptq", "b4_plain_v1", "scales"),
        ("gptq", "b4_plain_v1", "qzeros"),
        ("awq", "gemm", "scales"),
        ("compressed_tensors", "w4_symmetric", "weight_scale"),
        ("compressed_tensors", "w4_symmetric", "weight_shape"),
        ("compressed_tensors", "nvfp4", "weight_scale"),
        ("compressed_tensors", "nvfp4", "weight_global_scale"),
        ("bitsandbytes", "nf4", "weight.absmax"),
        ("bitsandbytes", "nf4_nested", "weight.nested_absmax"),
    ],
)
def test_missing_and_mismatched_parts_are_damage_by_name(name: str, case: str, leaf: str) -> None:
    missing = changed(f"{name}.safetensors", case, **{leaf: None})
    assert missing.exit_code == 3
    assert f"x.{leaf}" in missing.cause
    _, tensors, _ = stored(f"{name}.safetensors", case)
    whole = tensors[f"x.{leaf}"]
    other = checkpoint_files.Tensor(whole.dtype, (7, 5), whole.shard)
    assert f"x.{leaf}" in changed(f"{name}.safetensors", case, **{leaf: other}).cause
    assert changed(f"{name}.safetensors", case, **{leaf: other}).exit_code == 3


def test_scales_that_fit_no_block_are_damage() -> None:
    other = checkpoint_files.Tensor("BF16", (9, 9), "")
    error = changed("compressed_tensors.safetensors", "fp8_block", weight_scale=other)
    assert error.exit_code == 3
    assert "x.weight_scale" in error.cause


def test_order_of_groups_beyond_the_scales_is_not_read() -> None:
    """MLX takes what lies behind an array; NaN is found later, and named."""
    arrays, tensors, settings = stored("gptq.safetensors", "b4_act_v1")
    tensors.pop("x.expected")
    order = np.array(arrays["x.g_idx"])
    order[5] = 9999
    found, _ = methods.find(source_of(arrays, tensors, settings), "llama")
    value = np.array(found[0].read(arrays | {"x.g_idx": mx.array(order)}).astype(mx.float32))
    assert np.isnan(value[:, 5]).all()
    assert np.isfinite(np.delete(value, 5, axis=1)).all()


def test_zero_points_of_the_first_gptq_carry_as_gptqmodel_adds_them() -> None:
    arrays, tensors, settings = stored("gptq.safetensors", "b4_plain_v1")
    tensors.pop("x.expected")
    wanted = np.arange(16, dtype=np.uint64)  # zero points 0 to 15: one whole number less one in each field
    words = [sum(int(z) << (4 * i) for i, z in enumerate(half)) for half in wanted.reshape(2, 8)]
    less = np.array([(word - 0x11111111) % (1 << 32) for word in words], np.uint32)
    zeros = np.tile(less, (2, 2)).view(np.int32)
    found, _ = methods.find(source_of(arrays, tensors, settings), "llama")
    ones = {"x.scales": mx.ones_like(arrays["x.scales"]), "x.qweight": mx.zeros_like(arrays["x.qweight"])}
    value = np.array(found[0].read(arrays | ones | {"x.qzeros": mx.array(zeros)}))
    np.testing.assert_array_equal(-value[:, 0], np.tile(wanted, 2))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "bitnet"}, "bitnet"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "W4A16_AWQ"),
        ({"quant_method": "modelopt", "quantization": 3}, "modelopt"),
        ({"quant_method": "compressed-tensors", "format": ["pack-quantized"]}, "pack-quantized"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "transform_config": {"config_groups": {"u": {}}},
            },
            "transforms",
        ),
        ({"bits": 4}, "does not name"),
        ("nf4", "nf4"),
        (["x"], "x"),
    ],
)
def test_unknown_methods_are_unsupported_by_name(settings: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        methods.check(methods.settings({"quantization_config": settings}), "here")


@pytest.mark.parametrize(
    ("name", "settings", "tensors"),
    [
        ("GPTQ of 5 bits", {"quant_method": "gptq", "bits": 5},
         {"qweight": ("I32", (10, 64)), "scales": ("F16", (1, 64))}),
        ("'gemv'", {"quant_method": "awq", "version": "gemv"}, {"qweight": ("I32", (8, 8))}),
        ("'marlin'", {"quant_method": "gptq", "checkpoint_format": "marlin"}, {"qweight": ("I32", (8, 8))}),
        ("tensor x.qweight", {"quant_method": "fp8"}, {"qweight": ("I32", (8, 8))}),
        ("form of its own .tensor x.weight", {"quant_method": "modelopt"}, {"weight": ("U8", (8, 8))}),
        ("does not name", {}, {"weight_packed": ("I32", (8, 8))}),
        ("F8_E4M3 and no scale", {"quant_method": "fp8"}, {"weight": ("F8_E4M3", (8, 8))}),
        ("F8_E4M3 and no scale", {}, {"weight": ("F8_E4M3", (8, 8))}),
        ("mxfp4 experts", {"quant_method": "mxfp4"}, {"gate_up_proj_blocks": ("U8", (2, 8, 2, 16))}),
    ],
)  # fmt: skip
def test_sound_forms_without_a_reader_are_unsupported(
    name: str, settings: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    declared = {
        f"x.{leaf}": checkpoint_files.Tensor(dtype, shape, "") for leaf, (dtype, shape) in tensors.items()
    }
    with pytest.raises(UnsupportedError, match=name):
        methods.find(source_of({}, declared, settings), "llama")


@pytest.mark.parametrize(
    ("settings", "native"),
    [
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "fbgemm_fp8"}, True),
        ({"quant_method": "mxfp4"}, True),
        ({"quant_method": "gptq"}, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, True),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, False),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, False),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, True),
    ],
)
def test_eight_bit_floats_ask_for_no_flag(settings: dict[str, Any], native: bool) -> None:
    assert methods.is_native(settings) is native


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_streams_of_bits(bits: int) -> None:
    integers = np.random.default_rng(bits).integers(0, 1 << bits, (3, 45))
    words = np.zeros((3, -(-45 * bits // 32)), np.uint32)
    for row, values in zip(words, integers, strict=True):
        stream = sum(int(v) << (i * bits) for i, v in enumerate(values))
        row[:] = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(row))]
    np.testing.assert_array_equal(np.array(codes.unpack(mx.array(words), bits, 45)), integers)
