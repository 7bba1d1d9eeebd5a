"""Tiny .gguf files for tests, written as the standard converter writes them, and 1,000 odd lines of text."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

STORED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
STORED_GEMMA3 = STORED | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as the converter stores them: the two rotary halves of each head in turn."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored(arch: str, config: dict[str, Any], name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """The name and the weights under which a file holds an HF tensor; float32."""
    weight = weight.astype(np.float32)
    module, kind = name.rsplit(".", 1)
    block = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        block = f"blk.{number}."
    if arch == "llama" and module.endswith(("q_proj", "k_proj")):
        heads = config["num_attention_heads" if "q_proj" in module else "num_key_value_heads"]
        weight = interleave(weight, heads)
    if arch == "gemma3" and "norm" in module:
        weight = weight + 1
    return f"{block}{(STORED_GEMMA3 if arch == 'gemma3' else STORED)[module]}.{kind}", weight


def add_sizes(writer: GGUFWriter, arch: str, config: dict[str, Any]) -> None:
    """The metadata of a model's shape."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if arch != "qwen2":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch == "llama":
        writer.add_rope_dimension_count(config["head_dim"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])


def add_plain_tokenizer(writer: GGUFWriter, count: int) -> None:
    """A byte-level vocabulary with one merge, for tests of something else."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *letters, "th"]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(letters) + 1)
    types += [TokenType.UNUSED] * (count - len(tokens))
    tokens += [f"[PAD{i}]" for i in range(len(tokens), count)]
    add_tokenizer(
        writer, "gpt2", "qwen2" if writer.arch == "qwen2" else "gpt-2", tokens, types, merges=["t h"]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def add_tokenizer(
    writer: GGUFWriter,
    kind: str,
    pre: str | None,
    tokens: list[str],
    types: list[int],
    **lists: Any,
) -> None:
    """The keys of a tokenizer; lists: merges, scores."""
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(t) for t in types])
    if "scores" in lists:
        writer.add_token_scores(lists["scores"])
    if lists.get("merges"):
        writer.add_token_merges(lists["merges"])


def write_file(writer: GGUFWriter, path: Path) -> Path:
    """Close a writer and return its file."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path, arch: str, config: dict[str, Any], weights: dict[str, np.ndarray], **how: Any
) -> Path:
    """A whole model in a file.

    how: kind, a GGMLQuantizationType for the matrices (float32); keys, a function that adds metadata;
    tokenizer, one that adds another tokenizer; extra, tensors to add as they are.
    """
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    add_sizes(writer, arch, config)
    how.get("keys", lambda _: None)(writer)
    how.get("tokenizer", lambda w: add_plain_tokenizer(w, config["vocab_size"]))(writer)
    kind = how.get("kind", GGMLQuantizationType.F32)
    for name, weight in weights.items():
        target, values = stored(arch, config, name, weight)
        of = kind if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(target, quantize(values, of), raw_dtype=of)
    for name, values in how.get("extra", {}).items():
        writer.add_tensor(name, values)
    return write_file(writer, path)


def load_tokenizer(path: Path, folder: Path) -> Any:
    """The tokenizer as transformers loads it from a folder with the model's config.json."""
    from transformers import AutoTokenizer

    from spqt_cli.convert.gguf import checkpoint as gguf
    from spqt_cli.convert.gguf.file import read_header

    arch = read_header(path).metadata["general.architecture"]
    model_type = {"gemma3": "gemma3_text"}.get(arch, arch)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    gguf.write_tokenizer(path, folder)
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, line: str) -> list[int]:
    found = tokenizer.encode(line)
    return found if isinstance(found, list) else found.ids


BLOCKS = [
    *((0x21, 0x7E), (0xA1, 0x17F), (0x1E00, 0x1EFF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF)),
    *((0x531, 0x58A), (0x5D0, 0x5EA), (0x610, 0x6FF), (0x901, 0x97F), (0x985, 0x9B9), (0xB85, 0xBB9)),
    *((0xE01, 0xE5B), (0xF00, 0xF47), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x1248)),
    *((0x1780, 0x17DD), (0x2010, 0x205E), (0x2070, 0x209C), (0x20A0, 0x20BF), (0x2150, 0x218B)),
    *((0x2190, 0x22FF), (0x2500, 0x25FF), (0x2600, 0x27BF), (0x3041, 0x30FF), (0x3131, 0x318E)),
    *((0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFB06), (0xFE70, 0xFEFC)),
    *((0xFF01, 0xFF9D), (0x10330, 0x1034A), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)),
]
WHITE = " \t\n\r\u00a0\u1680\u2002\u2003\u2009\u200b\u2028\u202f\u205f\u3000"
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇳🇴", "❤️", "1️⃣", "🧑🏿‍🚀"]
WORDS = [
    *("the", "quick", "brown", "fox", "doesn't", "jump", "over", "12", "lazy", "dogs;", "they'll", "SING"),
    *("3.14159", "songs", "aaaaaaa", "haha", "bananas"),
]
MARKS = [
    *("  ", "   ", "\n\n", "\r\n", " ½ ", "  1", "²", "١٢٣", "१२", "Ⅷ", "▁", "e\u0301", "ﬁ", "'S", "'ve"),
    "...",
]


def odd_lines(count: int, special: list[str], seed: int = 0) -> list[str]:
    """Lines of many scripts, emoji, white space, digits and the given tokens."""
    chance = random.Random(seed)

    def piece() -> str:
        kind = chance.randrange(8)
        if kind == 0:
            first, last = chance.choice(BLOCKS)
            return "".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, 6)))
        if kind == 1:
            return "".join(chance.choice(WHITE) for _ in range(chance.randint(1, 4)))
        if kind == 2 and special:
            return chance.choice(special)
        if kind == 3:
            return chance.choice(EMOJI)
        if kind == 4:
            return chance.choice(MARKS)
        return chance.choice(WORDS) + chance.choice(["", " ", " ", "  "])

    fixed = ["", " ", "  ", "\n", " a", "a ", "  a  ", "\t a", *special, *(s + " a" for s in special)]
    return fixed + ["".join(piece() for _ in range(chance.randint(1, 20))) for _ in range(count - len(fixed))]
