"""Architectures of every kind that mlx-lm has: convert, load, one sparse step that equals the dense one."""

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from spqt_cli.convert import convert
from spqt_cli.decode import phase, session
from spqt_cli.decode.layers import zigzag_layers
from tests.conftest import SIZES, random_weights, write_tokenizer

COMMON = {key: SIZES[key] for key in SIZES if key not in ("head_dim", "torch_dtype")}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale_all_dim": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "fused qkv and gate_up (phi3)": {"model_type": "phi3"},
    "norms on q and k (qwen3)": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "biases and layer norm (starcoder2)": {
        "model_type": "starcoder2", "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True,
    },
    "soft-capped logits (gemma2)": {
        "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "experts w1 w2 w3 (mixtral)": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
    },
    "experts and a dense layer (qwen3_moe)": {
        "model_type": "qwen3_moe", "head_dim": 16, "tie_word_embeddings": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [0], "norm_topk_prob": True, **MIXTURE,
    },
    "latent attention (deepseek_v2)": {
        "model_type": "deepseek_v2", "rope_scaling": YARN, "kv_lora_rank": 32, "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32, "qk_nope_head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "topk_group": 1, "n_group": 1, "routed_scaling_factor": 1.0,
        "num_key_value_heads": 4,
    },
    "state space (mamba)": {
        "model_type": "mamba", "state_size": 16, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": 48, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_convert_load_and_step(name, tmp_path):
    config = {**COMMON, **CONFIGS[name]}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, seed=1)
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(source)
    result = convert.convert(str(source), tmp_path / "out", convert.ConvertOptions(bits=8, group_size=32))
    loaded = session.load(tmp_path / "out")
    layers = zigzag_layers(loaded.model)
    assert result.layers == len(layers) >= 4
    assert not [path for path in layers if path.endswith(("lm_head", "embed_tokens", "mlp.gate", "router"))]
    ids = mx.array([[5, 6, 7, 8, 9]])
    dense = _last_step(loaded.model, ids)
    for layer in layers.values():
        layer.set_threshold(0.0)
    sparse = _last_step(loaded.model, ids)
    # The same products summed in another order, through two layers of float32.
    assert mx.allclose(sparse, dense, rtol=1e-3, atol=1e-3 * mx.abs(dense).max().item())


def _last_step(network, ids: mx.array) -> mx.array:
    cache = make_prompt_cache(network)
    network(ids[:, :-1], cache=cache)
    with phase.decoding():
        return network(ids[:, -1:], cache=cache)[0, -1]
