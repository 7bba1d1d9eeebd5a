"""Weights that other libraries packed, held against those libraries' own unpacking (tests/data/packed)."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from spqt_cli import checks
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.unpack import codes, methods
from spqt_cli.unpack.packed import Source

DATA = Path(__file__).parent / "data" / "packed"


def cases() -> list[tuple[str, str]]:
    found = []
    for path in sorted(DATA.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found += [(path.name, case) for case in sorted(file.metadata())]
    return found


def stored(name: str, case: str) -> tuple[dict[str, mx.array], dict[str, checks.Tensor], dict[str, Any]]:
    """A case's tensors and headers under the names that a checkpoint has, and its quantization_config."""
    path = DATA / name
    declared, metadata = checks.read_shard(path, name, checks.EIGHT_BITS)
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mine = [key for key in declared if key.startswith(f"{case}.")]
    named = {key: "x." + key.removeprefix(f"{case}.") for key in mine}
    tensors = {named[key]: declared[key] for key in mine}
    return {named[key]: arrays[key] for key in mine}, tensors, json.loads(metadata[case])


def source_of(
    arrays: dict[str, mx.array], tensors: dict[str, checks.Tensor], settings: dict[str, Any], **more: Any
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
