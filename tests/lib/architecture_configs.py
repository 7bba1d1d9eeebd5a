"""Tiny configs of every architecture that mlx-lm has, derived from the fields of each class's ModelArgs."""

import dataclasses
import importlib
import pkgutil
from typing import Any

VOCAB = 512
# By the names that configs use. Every one is a valid size for 128 features in heads of 32.
VALUES: dict[str, Any] = {
    "vocab_size": VOCAB, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "attention_bias": False, "mlp_bias": False,
    # width, depth
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim", "model_dim", "dim", "block_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ff_intermediate_size", "n_inner",
                     "intermediate_size_mlp", "shared_intermediate_size"), 192),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads",
                     "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim",
                     "swa_v_head_dim", "index_head_dim", "global_head_dim", "query_pre_attn_scalar"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts",
                     "num_shared_expert"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq",
                     "first_k_dense_replace"), 1),
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "mlp_only_layers": [],
    # linear attention, state spaces
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 32),
    "linear_conv_kernel_dim": 4, "state_size": 16, "conv_kernel": 4, "time_step_rank": 48,
    # windows: shorter than the prompts here
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 24),
    # the rest, as most checkpoints have it
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon",
                     "post_norm_eps"), 1e-5),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
                     "scale_emb", "scale_depth"), 1.0),
    **dict.fromkeys(("use_bias", "use_conv_bias", "use_qkv_bias", "mlp_bias", "conv_bias", "mamba_proj_bias",
                     "use_cla", "use_mixed_mlp_moe", "linear_allow_neg_eigval", "post_norm"), False),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "use_expert_bias", "mla_scale_q_lora",
                     "mla_scale_kv_lora"), True),
    "partial_rotary_factor": 0.5, "rotary_dim": 16, "rotary_emb_base": 10000, "rotary_pct": 0.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "cla_share_factor": 2,
    **dict.fromkeys(("n_positions", "n_ctx", "block_size", "model_max_length"), 512),
    "dim_model_base": 128, "conv_L_cache": 3, "conv1d_width": 4, "conv_window": 2, "logits_soft_cap": 30.0,
    "n_groups": 1, "num_dense_layers": 1, "zero_expert_num": 2, "index_n_heads": 4, "index_topk": 16,
    "group_norm_size": 1, "layer_group_size": 4, "sliding_window_pattern": 2, "full_attention_interval": 4,
    "hidden_activation": "silu",
}  # fmt: skip

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXED = [SLIDING, FULL, SLIDING, FULL]
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale_all_dim": 1.0}
HALF = {**ROPE, "partial_rotary_factor": 0.5}
PROPORTIONAL = {
    SLIDING: ROPE,
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
MSCALE = {**YARN, "rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "rope_theta": 10000.0}
LINEAR_ATTENTION = {
    "kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 32,
    "short_conv_kernel_size": 4,
}  # fmt: skip
# What a class wants beside or otherwise. "text_config": the class that has the language model's fields.
SETTINGS: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": MIXED},
    "apertus": {"hidden_act": "xielu"},
    "baichuan_m1": {"sliding_window_layers": [1, 3]},
    "bailing_hybrid": {"partial_rotary_factor": 1.0},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {**YARN, "mscale": 1.0}},
    "deepseek_v41": {"o_groups": 2, "o_lora_rank": 64, "compress_ratios": [0, 4, 4, 0]},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "exaone4": {"sliding_window_pattern": "LG", "layer_types": MIXED, "rope_scaling": None},
    "exaone_moe": {"layer_types": MIXED, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 32, "mamba_n_heads": 4},
    "gear": {"layer_types": MIXED},  # transformers 5 refuses the name of its third kind, conv_mixer
    "gemma3": {"text_config": "gemma3_text.ModelArgs", "vocab_size": VOCAB},
    "gemma3n": {
        "text_config": "gemma3n.TextConfig", "model_type": "gemma3n_text",
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0, "layer_types": MIXED, "hidden_size_per_layer_input": 32,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "altup_num_inputs": 4,
        "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 32,
    },
    "gemma4": {
        "text_config": "gemma4_text.ModelArgs", "vocab_size": VOCAB, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB, "enable_moe_block": False,
        "layer_types": MIXED, "rope_parameters": PROPORTIONAL, "use_double_wide_mlp": False,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB,
        "layer_types": MIXED, "rope_parameters": PROPORTIONAL, "use_double_wide_mlp": False,
    },
    "glm": {"partial_rotary_factor": 1.0},
    "glm4_moe": {"rope_scaling": None},
    "glm4_moe_lite": {"partial_rotary_factor": 1.0},
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "gpt_oss": {"rope_scaling": {"rope_type": "default"}},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_d_head": 32, "mamba_d_state": 32,
        "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_proj_bias": False,
        "mamba_conv_bias": True, "position_embedding_type": "rope",
    },
    "hunyuan": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "internlm3": {"head_dim": 32},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 48,
    },
    "kimi_k25": {"text_config": "deepseek_v3.ModelArgs"},
    "kimi_k3": {
        "text_config": "kimi_k3.TextArgs", "linear_attn_config": LINEAR_ATTENTION,
        "activation_situ_beta": 1.0, "attn_res_block_size": 2, "num_experts_per_token": 2,
        "routed_expert_hidden_size": 64,
    },
    "kimi_linear": {"linear_attn_config": LINEAR_ATTENTION, "num_experts_per_token": 2},
    "kimi_vl": {"text_config": "kimi_vl.TextArgs"},
    "lfm2": {
        "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", FULL, "conv", FULL],
    },
    "lfm2-vl": {
        "text_config": "lfm2.ModelArgs", "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "layer_types": ["conv", FULL, "conv", FULL],
    },
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv", FULL]},
    "llama4": {
        "text_config": "llama4.TextArgs", "attention_chunk_size": 24, "interleave_moe_layer_step": 2,
        "rope_scaling": None, "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {"head_dim": 32, "attention_method": "MLA", "zero_expert_type": "identity"},
    "longcat_flash_ngram": {"ngram_vocab_size_ratio": 2},
    "mamba": {"num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "time_step_limit": [0.0, 100.0], "intermediate_size": 256, "state_size": 32},
    "mellum": {"layer_types": MIXED, "rope_parameters": {SLIDING: ROPE, FULL: ROPE}},
    "mimo_v2_flash": {
        "rope_parameters": {SLIDING: HALF, FULL: HALF}, "sliding_window": 24,
        "layer_types": [FULL, SLIDING, FULL, SLIDING],
        "hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 1, 1], "swa_rope_theta": 10000.0,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
    },
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 512, "type": "longrope", "short_factor": [1.0] * 16,
            "long_factor": [1.0] * 16,
        },
    },
    "minimax_m3_vl": {
        "text_config": "minimax_m3_vl.TextArgs", "dense_intermediate_size": 192,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "ministral3": {
        "rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512},
        "sliding_window": None,
    },
    "mistral3": {"text_config": "llama.ModelArgs"},
    "mistral4": {
        "rope_parameters": {
            **MSCALE, "partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 512,
        },
    },
    "muse_glimmer": {"layer_types": MIXED},
    "muse_spark": {
        "text_config": "muse_spark.TextArgs", "rope_parameters": ROPE, "layer_types": MIXED,
        "layer_rope_theta": [10000.0, 0, 10000.0, 0], "final_logit_softcapping": 20.0,
        "output_multiplier": 1.0, "moe_hidden_size": 128, "num_shared_experts": 0,
        "outer": {"audio_config": {"out_hidden_size": 128}, "out_hidden_size": 128},
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}}] * 4,
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"], "ssm_state_size": 32},
    "olmo3": {"rope_theta": 500000.0},
    "olmo_hybrid": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "openelm": {
        "ffn_dim_divisor": 32, "num_query_heads": [4] * 4, "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.5] * 4,
    },
    # Its class writes to the logits of fixed tokens up to 100351, and beyond a smaller vocabulary's memory.
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "ff_intermediate_size": 192,
                  "vocab_size": 100352},
    "phixtral": {"num_vocab": VOCAB, "model_dim": 128, "num_heads": 4, "num_layers": 4, "rotary_dim": 16,
                 "num_local_experts": 4, "num_experts_per_tok": 2},
    "pixtral": {"text_config": "llama.ModelArgs"},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 32, "mamba_d_state": 16},
    "qwen": {"kv_channels": 32, "num_key_value_heads": 4, "no_bias": True},
    "qwen2_vl": {"text_config": "qwen2.ModelArgs"},
    "qwen3_5": {"text_config": "qwen3_5.TextModelArgs", "num_experts": 0},
    "qwen3_5_moe": {"text_config": "qwen3_5.TextModelArgs"},
    "qwen3_vl": {"text_config": "qwen3.ModelArgs"},
    "qwen3_vl_moe": {"text_config": "qwen3_moe.ModelArgs"},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv7": {
        "a_low_rank_dim": 32, "v_low_rank_dim": 32, "gate_low_rank_dim": 32, "decay_low_rank_dim": 32,
    },
    "spark2_5": {"rope_parameters": {SLIDING: ROPE, FULL: ROPE}},
    "step3p5": {"moe_top_k": 2, "share_expert_dim": 64, "layer_types": MIXED, "moe_layers_enum": "1,2,3"},
}  # fmt: skip


def names() -> list[str]:
    """Every module of mlx_lm.models."""
    from mlx_lm import models

    return sorted(module.name for module in pkgutil.iter_modules(models.__path__))


def fields(args_class: Any) -> dict[str, Any]:
    """The values for a ModelArgs class, of those names that it has."""
    return {
        field.name: VALUES[field.name] for field in dataclasses.fields(args_class) if field.name in VALUES
    }


def config(name: str) -> dict[str, Any]:
    """A tiny config.json of the architecture."""
    own = SETTINGS.get(name, {})
    inner = own.get("text_config")
    if inner is None:
        module = importlib.import_module(f"mlx_lm.models.{name}")
        return {**fields(module.ModelArgs), **own, "model_type": name}
    module_name, _, args_name = inner.partition(".")
    args_class = getattr(importlib.import_module(f"mlx_lm.models.{module_name}"), args_name)
    text = {**fields(args_class), "model_type": module_name, **own}
    del text["text_config"]
    outer = {"vocab_size": VOCAB} if own.get("vocab_size") else text.pop("outer", {})  # beside the text model
    return {"model_type": name, "text_config": text, **outer}
