"""PEFT adapters become mlx-lm's: equal to PEFT's definition, and refused where they would not be."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from spqt_cli.adapt import peft
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError, UnsupportedError
from tests.decode.test_generate import dequantized_copy

SIZES = {"q_proj": (64, 64), "v_proj": (32, 64), "down_proj": (64, 160)}
MODULES = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "lora_dropout": 0.05,
    "target_modules": list(SIZES), "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip


def write(folder: Path, layers=(0, 1), ranks=None, **changes: Any) -> dict[str, np.ndarray]:
    """A PEFT adapter as its save_pretrained writes it, of random matrices; its tensors."""
    config, draw, tensors = SETTINGS | changes, np.random.default_rng(3), {}
    for layer in layers:
        for name, (outputs, inputs) in SIZES.items():
            rank = (ranks or {}).get(name, config["r"])
            place = f"base_model.model.model.layers.{layer}.{MODULES[name]}.{name}"
            tensors[f"{place}.lora_A.weight"] = draw.normal(size=(rank, inputs)) * 0.2
            tensors[f"{place}.lora_B.weight"] = draw.normal(size=(outputs, rank)) * 0.2
            if config["use_dora"]:
                tensors[f"{place}.lora_magnitude_vector"] = draw.uniform(0.5, 1.5, outputs)
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def merged(converted: Path, tensors: dict[str, np.ndarray], scale: dict[str, float], dora: bool) -> Any:
    """A plain model with the adapter in its weights, by PEFT's formulas."""
    plain = dequantized_copy(session.load(converted, dense=True))
    modules = dict(plain.named_modules())
    for name, up in tensors.items():
        if not name.endswith(".lora_B.weight"):
            continue
        place = name.removesuffix(".lora_B.weight")
        module: Any = modules[place.removeprefix("base_model.model.")]
        delta = scale[place.rsplit(".", 1)[1]] * up @ tensors[f"{place}.lora_A.weight"]
        w = np.array(module.weight) + delta
        if dora:
            norms = np.linalg.norm(w, axis=1, keepdims=True)
            w = tensors[f"{place}.lora_magnitude_vector"][:, None] / norms * w
        module.weight = mx.array(w.astype(np.float32))
    return plain


def assert_same(converted, adapter, plain):
    loaded = session.load(converted, adapter_path=str(adapter), dense=True)
    tokens = mx.array([[1, 60, 70, 300, 9]])
    found, expected = (np.array(model(tokens)) for model in (loaded.model, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_it_computes_what_peft_computes(converted, tmp_path, dora, layers):
    tensors = write(tmp_path / "peft", layers, use_dora=dora)
    result = peft.convert(tmp_path / "peft", tmp_path / "out")
    assert (result.kind, result.layers, result.rank) == ("dora" if dora else "lora", 3 * len(layers), 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "peft"]
    scale = dict.fromkeys(SIZES, 12 / 4)
    assert_same(converted, tmp_path / "out", merged(converted, tensors, scale, dora))


def test_ranks_and_scales_of_layers_may_differ(converted, tmp_path):
    tensors = write(
        tmp_path / "peft", ranks={"v_proj": 2, "q_proj": 7}, use_rslora=True,
        rank_pattern={"v_proj": 2, "q_proj": 7}, alpha_pattern={"mlp.down_proj": 6},
    )  # fmt: skip
    peft.convert(tmp_path / "peft", tmp_path / "out")
    scale = {"q_proj": 12 / 7**0.5, "v_proj": 12 / 2**0.5, "down_proj": 6 / 4**0.5}
    assert_same(converted, tmp_path / "out", merged(converted, tensors, scale, dora=False))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alpha_pattern": {"^model": 3}}, "alpha_pattern"),
    ],
)
def test_what_mlx_lm_has_nothing_for_is_refused(tmp_path, changes, said):
    write(tmp_path / "peft", **changes)
    with pytest.raises(UnsupportedError, match=said):
        peft.convert(tmp_path / "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.bias", "x.lora_embedding_A"])
def test_other_tensors_are_not_dropped(tmp_path, name):
    tensors = write(tmp_path / "peft")
    more = {f"base_model.model.{name}": np.ones((2, 2), np.float32)}
    save_file(tensors | more, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="no LoRA matrix"):
        peft.convert(tmp_path / "peft", tmp_path / "out")


def without(tensors, end):
    return {name: array for name, array in tensors.items() if not name.endswith(end)}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors: without(tensors, "0.self_attn.q_proj.lora_B.weight"), "is incomplete"),
        (lambda tensors: {name: array * np.nan for name, array in tensors.items()}, "NaN"),
        (lambda tensors: {name: array[:1] for name, array in tensors.items()}, "has shapes"),
        (lambda _: {}, "is empty"),
    ],
)
def test_damaged_ones_are_told(tmp_path, damage, said):
    tensors = write(tmp_path / "peft")
    save_file(damage(tensors), tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(SpqtError, match=said):
        peft.convert(tmp_path / "peft", tmp_path / "out")


@pytest.mark.parametrize("value", ["12", None, True, float("nan"), 10**400])
def test_numbers_that_are_none(tmp_path, value):
    write(tmp_path / "peft", lora_alpha=value)
    with pytest.raises(SpqtError, match="lora_alpha"):
        peft.convert(tmp_path / "peft", tmp_path / "out")


def test_pickles_are_never_opened(tmp_path):
    write(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickled"):
        peft.convert(tmp_path / "peft", tmp_path / "out")


def test_one_of_mlx_lms_own_needs_no_conversion(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    with pytest.raises(SpqtError, match="is no PEFT adapter"):
        peft.convert(tmp_path, tmp_path / "out")
