"""A .gguf file of random weights in the sizes of OLMoE, for llama.cpp to decode: Q4_0, the head Q6_K."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

SEED = 0
Q4_0_WEIGHTS, Q4_0_BYTES = 32, 18  # of a block: a float16 scale, then codes
Q6_K_WEIGHTS, Q6_K_BYTES = 256, 210  # codes, 16 scales of 8 bits, then a float16 scale


def q4_0(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Random weights (..., inputs), about as large as a layer's are: uint8 (..., bytes)."""
    blocks = shape[-1] // Q4_0_WEIGHTS
    made = random.integers(0, 256, (*shape[:-1], blocks, Q4_0_BYTES), np.uint8)
    made[..., :2] = np.frombuffer(np.float16(0.2 / shape[-1] ** 0.5).tobytes(), np.uint8)
    return made.reshape(*shape[:-1], blocks * Q4_0_BYTES)


def q6_k(random: np.random.Generator, *shape: int) -> np.ndarray:
    """As `q4_0`."""
    blocks = shape[-1] // Q6_K_WEIGHTS
    made = random.integers(0, 256, (*shape[:-1], blocks, Q6_K_BYTES), np.uint8)
    made[..., 192:208] = 64
    made[..., 208:] = np.frombuffer(np.float16(0.001 / shape[-1] ** 0.5).tobytes(), np.uint8)
    return made.reshape(*shape[:-1], blocks * Q6_K_BYTES)


def write(config: dict[str, Any], path: Path) -> None:
    """Write a model of that config, of the architecture olmoe; every block has the same numbers."""
    width, middle, experts = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    random = np.random.default_rng(SEED)
    writer = GGUFWriter(path, "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(middle)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    ones = np.ones(width, np.float32)
    block = {
        "attn_q": q4_0(random, width, width), "attn_k": q4_0(random, keys, width),
        "attn_v": q4_0(random, keys, width), "attn_output": q4_0(random, width, width),
        "ffn_gate_exps": q4_0(random, experts, middle, width),
        "ffn_up_exps": q4_0(random, experts, middle, width),
        "ffn_down_exps": q4_0(random, experts, width, middle),
    }  # fmt: skip
    router = random.normal(size=(experts, width)).astype(np.float32) / width**0.5
    writer.add_tensor("token_embd.weight", q4_0(random, config["vocab_size"], width), raw_dtype=Kind.Q4_0)
    writer.add_tensor("output.weight", q6_k(random, config["vocab_size"], width), raw_dtype=Kind.Q6_K)
    writer.add_tensor("output_norm.weight", ones)
    for number in range(config["num_hidden_layers"]):
        for name, data in block.items():
            writer.add_tensor(f"blk.{number}.{name}.weight", data, raw_dtype=Kind.Q4_0)
        for name in ("attn_norm", "ffn_norm", "attn_q_norm"):
            writer.add_tensor(f"blk.{number}.{name}.weight", ones)
        writer.add_tensor(f"blk.{number}.attn_k_norm.weight", np.ones(keys, np.float32))
        writer.add_tensor(f"blk.{number}.ffn_gate_inp.weight", router)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
