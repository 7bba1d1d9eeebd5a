"""Which layers become Zigzag, which stay row-grouped, and what the plan says of sizes."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.convert import plan, source
from spqt_cli.convert.plan import PLAIN, ROWS, ZIGZAG, Plan, Wishes
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import layout
from tests.conftest import ARCHITECTURES, SIZES, random_weights, tiny_checkpoint, write_tokenizer

MOE = {**SIZES, "num_experts_per_tok": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**MOE, "model_type": "mixtral", "num_local_experts": 4},
    "qwen2_moe": {
        **MOE,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {
        **MOE,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "granite": {
        **SIZES,
        "model_type": "granite",
        "logits_scaling": 1.0,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "deepseek_v3": {
        **MOE,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "first_k_dense_replace": 1,
    },
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": SIZES["vocab_size"],
        "text_config": {**SIZES, **ARCHITECTURES["gemma3"]},
        "vision_config": {},
    },
}


def checkpoint_of(folder: Path, config: dict[str, Any], **more: mx.array) -> source.Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), random_weights(config, 0) | more)
    write_tokenizer(folder)
    return source.open_source(str(folder), None, source.Trust())


def planned(tmp_path: Path, name: str, **wishes: Any) -> tuple[Plan, dict[str, str]]:
    """The plan of a tiny model, and its kinds by module path."""
    checkpoint = checkpoint_of(tmp_path / name, CONFIGS[name])
    result, _ = plan.make(checkpoint, Wishes(group_size=32, **wishes))
    return result, {unit.path: unit.kind for unit in result.units if unit.name.endswith(".weight")}


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.gate"),
        ("qwen2_moe", "model.layers.1.mlp.gate"),
        ("qwen3_moe", "model.layers.1.mlp.gate"),
        ("deepseek_v3", "model.layers.1.mlp.gate"),
    ],
)
def test_routers_stay_and_experts_are_zigzag(tmp_path: Path, name: str, router: str) -> None:
    result, kinds = planned(tmp_path, name)
    assert kinds[router] != ZIGZAG
    assert kinds["model.layers.1.self_attn.o_proj"] == ZIGZAG
    experts = [path for path in kinds if ".switch_mlp." in path]
    assert experts
    assert {kinds[path] for path in experts} == {ZIGZAG}
    assert {result.quantization[path]["spqt"]["experts"] for path in experts} == {4}
    parts = {part.name: part.shape for unit in result.units for part in unit.parts}
    assert {parts[f"{path}.weight"][0] for path in experts} == {4}
    assert kinds["model.embed_tokens"] == kinds["lm_head"] == ROWS
    assert kinds["model.layers.1.input_layernorm"] == PLAIN


def test_gate_of_a_shared_expert_stays(tmp_path: Path) -> None:
    _, kinds = planned(tmp_path, "qwen2_moe")
    assert kinds["model.layers.0.mlp.shared_expert_gate"] != ZIGZAG
    assert kinds["model.layers.0.mlp.shared_expert.up_proj"] == ZIGZAG


def test_router_under_an_unknown_name_is_known_by_its_width(tmp_path: Path) -> None:
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear

    model = nn.Module()
    block = nn.Module()
    block.chooser = nn.Linear(64, 4, bias=False)
    block.other = nn.Linear(64, 64, bias=False)
    block.experts = SwitchLinear(64, 64, 4, bias=False)
    model.layers = [block, nn.Module()]
    decide = plan.Decisions(model, Wishes(group_size=32))
    assert decide.kind("layers.0.chooser")[0] == ROWS
    assert decide.kind("layers.0.other")[0] == ZIGZAG


def test_multilinear_stays(tmp_path: Path) -> None:
    _, kinds = planned(tmp_path, "deepseek_v3")
    assert kinds["model.layers.1.self_attn.embed_q"] == ROWS


def test_other_bits_of_the_models_own_predicate(tmp_path: Path) -> None:
    result, kinds = planned(tmp_path, "granite")
    path = "model.layers.0.mlp.down_proj"
    assert kinds[path] == ZIGZAG
    entry = result.quantization[path]
    assert (entry["bits"], entry["group_size"], entry["mode"]) == (8, 64, "zigzag")
    assert result.quantization["model.layers.0.mlp.up_proj"]["bits"] == 4


def test_predicate_router_is_listed_with_its_bits(tmp_path: Path) -> None:
    result, _ = planned(tmp_path, "qwen3_moe")
    assert result.quantization["model.layers.0.mlp.gate"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_vision_tower_stays() -> None:
    paths = ["vision_tower.blocks.0.mlp.fc1", "model.visual.blocks.3.attn.qkv", "audio_encoder.layers.0.fc"]
    assert all(plan.TOWER.search(path) for path in paths)
    assert not plan.TOWER.search("language_model.model.layers.0.mlp.up_proj")


def test_vision_weights_are_dropped_by_mlx_lm(tmp_path: Path) -> None:
    extra = {
        "vision_tower.blocks.0.fc1.weight": mx.zeros((64, 64)),
        "multi_modal_projector.w": mx.zeros((4,)),
    }
    checkpoint = checkpoint_of(tmp_path / "vlm", CONFIGS["gemma3"], **extra)
    result, _ = plan.make(checkpoint, Wishes(group_size=32))
    assert all("vision" not in unit.name for unit in result.units)
    assert sum(unit.kind == ZIGZAG for unit in result.units) == 14


@pytest.mark.parametrize(
    ("wishes", "bits"),
    [({}, 5), ({"bits": 8}, 8), ({"bits": 3}, 5), ({"head_bits": 4}, 4), ({"head_bits": 8}, 8)],
)
def test_embedding_and_head_have_bits_of_their_own(tmp_path: Path, wishes: dict[str, int], bits: int) -> None:
    result, _ = planned(tmp_path, "mixtral", **wishes)
    found = {unit.path: unit.bits for unit in result.units if unit.kind in (ROWS, ZIGZAG)}
    body = wishes.get("bits", 4)
    assert found["model.embed_tokens"] == found["lm_head"] == bits
    assert {found[path] for path in found if ".switch_mlp." in path} == {body}
    listed = result.quantization.get("lm_head", {"bits": body})
    assert listed["bits"] == bits


def test_own_settings_of_projections(tmp_path: Path) -> None:
    own = (("attn.k_proj", 8, 64), ("proj", 5, 32))
    result, kinds = planned(tmp_path, "qwen3_moe", projections=own, skip=("o_proj",))
    found = {unit.path: (unit.bits, unit.group_size) for unit in result.units if unit.bits}
    assert found["model.layers.0.self_attn.k_proj"] == (8, 64)  # the first that fits
    assert found["model.layers.0.self_attn.v_proj"] == (5, 32)
    assert kinds["model.layers.0.self_attn.o_proj"] == ROWS
    assert found["model.layers.0.self_attn.o_proj"] == (4, 32)  # Zigzag layers alone
    assert {found[path] for path in found if ".switch_mlp." in path} == {(5, 32)}


def test_models_own_rules_stand_above_wishes(tmp_path: Path) -> None:
    result, _ = planned(tmp_path, "granite", projections=(("down_proj", 5, 32),))
    assert result.quantization["model.layers.0.mlp.down_proj"]["bits"] == 8


def test_skipped_experts_stay_row_grouped(tmp_path: Path) -> None:
    result, kinds = planned(tmp_path, "mixtral", skip=("switch_mlp.down_proj",))
    assert kinds["model.layers.1.block_sparse_moe.switch_mlp.down_proj"] == ROWS
    assert kinds["model.layers.1.block_sparse_moe.switch_mlp.up_proj"] == ZIGZAG
    reasons = {unit.path: unit.reason for unit in result.units}
    assert reasons["model.layers.1.block_sparse_moe.switch_mlp.down_proj"] == plan.KEPT_BY_WISH


def test_skipped_suffix_stays_row_grouped(tmp_path: Path) -> None:
    _, kinds = planned(tmp_path, "granite", skip=("o_proj",))
    assert kinds["model.layers.0.self_attn.o_proj"] == ROWS
    assert kinds["model.layers.0.self_attn.q_proj"] == ZIGZAG


def test_fault_22_inputs_no_multiple_of_the_group(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", hidden_size=80)
    result, _ = plan.make(source.open_source(str(folder), None, source.Trust()), Wishes(group_size=64))
    assert result.unquantized == ["model.embed_tokens"]
    kinds = {unit.path: unit.kind for unit in result.units}
    assert kinds["model.layers.0.self_attn.q_proj"] == ZIGZAG  # 80 inputs are free there


def test_fault_22_nothing_to_pack(tmp_path: Path) -> None:
    checkpoint = source.open_source(str(tiny_checkpoint(tmp_path / "m")), None, source.Trust())
    with pytest.raises(UnsupportedError, match="no layer"):
        plan.make(checkpoint, Wishes(skip=("_proj",)))


def test_fault_24_tied_embeddings_once(tmp_path: Path) -> None:
    config = {**SIZES, **ARCHITECTURES["llama"]}
    first = checkpoint_of(tmp_path / "first", config)
    embedding = first.weights()["model.embed_tokens.weight"]
    checkpoint = checkpoint_of(tmp_path / "m", config, **{"lm_head.weight": embedding})
    result, _ = plan.make(checkpoint, Wishes(group_size=32))
    assert [unit.name for unit in result.units if not unit.name.startswith("model.layers")] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]


def test_fault_14_missing_and_extra_tensors(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    shard = str(folder / "model.safetensors")
    weights = mx.load(shard)
    gone = "model.layers.1.mlp.up_proj.weight"
    mx.save_safetensors(shard, {name: array for name, array in weights.items() if name != gone})
    with pytest.raises(SpqtError, match=gone):
        plan.make(source.open_source(str(folder), None, source.Trust()), Wishes())
    mx.save_safetensors(shard, weights | {"model.layers.1.mlp.odd.weight": mx.zeros((4, 4))})
    with pytest.raises(SpqtError, match=r"mlp\.odd\.weight"):
        plan.make(source.open_source(str(folder), None, source.Trust()), Wishes())


def test_fault_15_shape_is_not_the_configs(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(SpqtError, match=r"mlp\.(gate|up|down)_proj\.weight is \(.*asks for"):
        plan.make(source.open_source(str(folder), None, source.Trust()), Wishes())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "2"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"hidden_size": -4},
        {"vocab_size": 1 << 40},
        {"rope_scaling": 7},
        {"text_config": 3, "num_hidden_layers": None},
    ],
)
def test_config_that_describes_no_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SpqtError):
        plan.make(source.open_source(str(folder), None, source.Trust()), Wishes())


def test_shapes_of_the_parts(tmp_path: Path) -> None:
    result, _ = planned(tmp_path, "granite")
    unit = next(unit for unit in result.units if unit.path == "model.layers.0.mlp.up_proj")
    # 160 outputs, 64 inputs, 4 bits, group 32: one band of 160
    assert unit.band == layout.band_of(160, 32) == 160
    assert [part.shape for part in unit.parts] == [(1, 64, 20), (1, 64, 5), (1, 64, 5)]
    assert [part.dtype for part in unit.parts] == ["U32", "F32", "F32"]


def test_layers_are_in_the_order_of_their_numbers() -> None:
    assert sorted(["layers.10.w", "layers.2.w", "a", "layers.2.b"], key=plan._natural) == [
        "a",
        "layers.2.b",
        "layers.2.w",
        "layers.10.w",
    ]
