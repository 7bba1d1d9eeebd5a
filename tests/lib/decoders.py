"""Twelve families of decoders written from their definitions, in NumPy and float64: what a config must give.

One function, steered by config keys under the names of transformers; rotary positions are spelled out anew.
Weights are those of a checkpoint, under its names. It imports nothing of spqt, MLX or transformers.
"""

import math
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
BASES = {"mixtral": 1e6, "smollm3": 2e6, "gemma3_text": 1e6}  # where config.json says none; else 10,000
BIASED = ("qwen2",)  # q, k and v have biases whatever the config says


def logits(config: dict[str, Any], weights: Arrays, ids: list[int]) -> np.ndarray:
    """Logits of every position, (tokens, vocabulary)."""
    model = _Decoder(config, {name: array.astype(np.float64) for name, array in weights.items()})
    return model.run(ids)


def rope_of(config: dict[str, Any], layer: int) -> dict[str, Any]:
    """Rotary settings of a layer from either spelling: rope_parameters, or rope_theta with rope_scaling."""
    local = config["model_type"] == "gemma3_text" and (layer + 1) % config["pattern"] != 0
    given = config.get("rope_parameters")
    if given is not None:
        return (
            given["sliding_attention" if local else "full_attention"] if "full_attention" in given else given
        )
    if local:
        return {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    base = config.get("rope_theta", BASES.get(config["model_type"], 1e4))
    return {"rope_theta": base, **(config.get("rope_scaling") or {})}


def angles(rope: dict[str, Any], dims: int, config: dict[str, Any]) -> tuple[np.ndarray, float]:
    """(radians per position of each pair, factor on queries and keys), within the trained length."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    base, pairs = rope["rope_theta"], np.arange(dims // 2)
    plain = np.array([base ** (-2 * i / dims) for i in pairs])
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "llama3":
        return np.array([_llama3(angle, rope) for angle in plain]), 1.0
    if kind == "yarn":
        return _yarn(plain, rope, dims)
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        factor = rope.get("factor") or config["max_position_embeddings"] / original
        scale = rope.get("attention_factor") or math.sqrt(1 + max(math.log(factor), 0) / math.log(original))
        return plain / np.array(rope["short_factor"]), scale
    return plain, 1.0  # default, and dynamic within the trained length


def _llama3(angle: float, rope: dict[str, Any]) -> float:
    wave, context = 2 * math.pi / angle, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    if wave < context / high:
        return angle
    if wave > context / low:
        return angle / factor
    smooth = (context / wave - low) / (high - low)
    return (1 - smooth) * angle / factor + smooth * angle


def _yarn(plain: np.ndarray, rope: dict[str, Any], dims: int) -> tuple[np.ndarray, float]:
    factor, context, base = rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]
    ends = [
        dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
    ]
    if rope.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dims - 1)
    slowed = np.clip((np.arange(dims // 2) - low) / (max(high - low, 0) or 0.001), 0, 1)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    own, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    derived = scale(own) / scale(all_dim) if own and all_dim else scale(1)
    return plain * (1 - slowed) + plain / factor * slowed, rope.get("attention_factor", derived)


def window_of(config: dict[str, Any], layer: int) -> int | None:
    """Tokens that a layer sees, itself among them; None for all."""
    kind, window = config["model_type"], config.get("sliding_window")
    if window is None or kind in ("llama", "granite", "olmo2"):
        return None
    if kind == "gemma2":
        return window if layer % 2 == 0 else None
    if kind == "gemma3_text":
        return window if (layer + 1) % config["pattern"] else None
    if kind in ("qwen2", "qwen3"):
        return window if config.get("use_sliding_window") and layer >= config["max_window_layers"] else None
    if kind == "smollm3":
        return None  # without layers that are not turned
    return window


def _act(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else np.tanh(x / cap) * cap


class _Decoder:
    def __init__(self, config: dict[str, Any], weights: Arrays) -> None:
        self.config, self.weights, self.kind = config, weights, config["model_type"]
        self.gemma = self.kind.startswith("gemma")
        self.head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        usual = "gelu_tanh" if self.gemma or self.kind == "starcoder2" else "silu"
        self.act = config.get("hidden_act", usual)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights[f"{name}.weight"]
        if self.kind == "starcoder2":
            x = x - x.mean(-1, keepdims=True)
            eps = self.config["norm_epsilon"]
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + self.weights[f"{name}.bias"]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x * (1 + weight if self.gemma else weight)

    def run(self, ids: list[int]) -> np.ndarray:
        config = self.config
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[ids] * config.get("embedding_multiplier", 1.0)
        if self.gemma:
            x = x * math.sqrt(config["hidden_size"])
        for layer in range(config["num_hidden_layers"]):
            x = self.block(layer, x)
        x = self.norm("model.norm", x)
        y = x @ self.weights.get("lm_head.weight", embedding).T / config.get("logits_scaling", 1.0)
        cap = config.get("final_logit_softcapping", 30.0 if self.kind == "gemma2" else None)
        return _softcap(y, cap)

    def block(self, layer: int, x: np.ndarray) -> np.ndarray:
        at, by = f"model.layers.{layer}.", self.config.get("residual_multiplier", 1.0)
        if self.kind == "olmo2":
            x = x + self.norm(f"{at}post_attention_layernorm", self.attention(layer, x))
            return x + self.norm(f"{at}post_feedforward_layernorm", self.mlp(at, x))
        y = self.attention(layer, self.norm(f"{at}input_layernorm", x))
        if self.kind in ("gemma2", "gemma3_text"):
            x = x + self.norm(f"{at}post_attention_layernorm", y)
            y = self.mlp(at, self.norm(f"{at}pre_feedforward_layernorm", x))
            return x + self.norm(f"{at}post_feedforward_layernorm", y)
        x = x + y * by
        return x + self.mlp(at, self.norm(f"{at}post_attention_layernorm", x)) * by

    def mlp(self, at: str, x: np.ndarray) -> np.ndarray:
        if self.kind == "starcoder2":
            return self.linear(f"{at}mlp.c_proj", _act(self.act, self.linear(f"{at}mlp.c_fc", x)))
        if self.kind == "mixtral":
            return self.experts(f"{at}block_sparse_moe.", x)
        if self.kind == "phi3":
            gate, up = np.split(self.linear(f"{at}mlp.gate_up_proj", x), 2, axis=-1)
        else:
            gate, up = self.linear(f"{at}mlp.gate_proj", x), self.linear(f"{at}mlp.up_proj", x)
        return self.linear(f"{at}mlp.down_proj", _act(self.act, gate) * up)

    def experts(self, at: str, x: np.ndarray) -> np.ndarray:
        scores, y = self.linear(f"{at}gate", x), np.zeros_like(x)
        for row in range(len(x)):
            chosen = np.argsort(-scores[row])[: self.config["num_experts_per_tok"]]
            shares = np.exp(scores[row, chosen] - scores[row, chosen].max())
            for expert, share in zip(chosen, shares / shares.sum(), strict=True):
                one = f"{at}experts.{expert}."
                hidden = _act(self.act, self.linear(f"{one}w1", x[row])) * self.linear(f"{one}w3", x[row])
                y[row] += share * self.linear(f"{one}w2", hidden)
        return y

    def attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        config, at, head = self.config, f"model.layers.{layer}.self_attn.", self.head
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        if self.kind == "phi3":
            whole = self.linear(f"{at}qkv_proj", x)
            q, k, v = np.split(whole, [heads * head, (heads + groups) * head], axis=-1)
        else:
            q, k, v = (self.linear(f"{at}{name}_proj", x) for name in "qkv")
        if self.kind == "olmo2":  # over all heads together
            q, k = self.norm(f"{at}q_norm", q), self.norm(f"{at}k_norm", k)
        q, k, v = (a.reshape(len(x), -1, head).swapaxes(0, 1) for a in (q, k, v))
        if self.kind in ("qwen3", "gemma3_text"):
            q, k = self.norm(f"{at}q_norm", q), self.norm(f"{at}k_norm", k)
        if not (self.kind == "smollm3" and not config["no_rope_layers"][layer]):
            q, k = self.turn(layer, q), self.turn(layer, k)
        k, v = (np.repeat(a, heads // groups, axis=0) for a in (k, v))
        width = config.get("query_pre_attn_scalar", 256) if self.gemma else head
        scale = config.get("attention_multiplier", width**-0.5)
        scores = q @ k.swapaxes(1, 2) * scale
        if self.kind == "gemma2":
            scores = _softcap(scores, config.get("attn_logit_softcapping", 50.0))
        behind = np.arange(len(x))[:, None] - np.arange(len(x))
        window = window_of(config, layer)
        scores = np.where((behind < 0) | (behind >= (window or len(x))), -np.inf, scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        y = shares / shares.sum(-1, keepdims=True) @ v
        return self.linear(f"{at}o_proj", y.swapaxes(0, 1).reshape(len(x), -1))

    def turn(self, layer: int, x: np.ndarray) -> np.ndarray:
        """x, (heads, tokens, width), each pair (i, i + dims / 2) turned by its position."""
        rope = rope_of(self.config, layer)
        share = rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
        dims = int(self.head * share)
        per_position, scale = angles(rope, dims, self.config)
        turned = np.arange(x.shape[1])[:, None] * per_position
        cos, sin = np.cos(turned) * scale, np.sin(turned) * scale
        first, second, rest = np.split(x, [dims // 2, dims], axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
