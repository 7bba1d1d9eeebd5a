"""Keys that change results and that mlx-lm's class of an architecture may not read: refused by name.

A class that does not read a key computes as transformers does by default: another value would be dropped.
"""

from typing import Any

from spqt_cli.convert.config.definition import Definition
from spqt_cli.errors import UnsupportedError

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "mamba_hidden_act")
EFFECTIVE = (
    *ACTIVATIONS, "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "lm_head_bias", "qk_layernorm",
    "use_qk_norm", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "use_bidirectional_attention", "clip_qkv", "rope_interleave", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    "swiglu_limit", "swiglu_alpha", "layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps", "logit_scale",
    "logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
    "moe_apply_router_weight_on_input", "residual_gate_temperature", "attn_temperature_tuning",
)  # fmt: skip
# Where mlx-lm's class divides by a number that transformers lets be null.
NUMBERS = {"gemma2": ("attn_logit_softcapping", "final_logit_softcapping")}
# One activation under several names, or so near that float16 tells no difference (below 5e-4).
SAME = {
    "swish": "silu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "quick_gelu": "quick",
}


def refuse(inner: dict[str, Any], meant: Definition, keys: set[str], name: str) -> None:
    """Raise UnsupportedError for the first key with an effect that a class reading `keys` would drop."""
    kind = inner.get("model_type")
    for key in NUMBERS.get(str(kind), ()):
        if key in inner and inner[key] is None:
            raise UnsupportedError(f"{name}: {key} is null, and mlx-lm's {kind} needs a number", _HINT)
    for key in EFFECTIVE:
        if key in keys or key not in inner or key not in (meant.defaults or {}):
            continue
        value, usual = inner[key], (meant.defaults or {})[key]
        if not _same(value, usual):
            raise UnsupportedError(
                f"{name}: {key} is {value!r}, and mlx-lm's class reads no such key (it does {usual!r})",
                _HINT,
            )
    hidden, heads, width = (inner.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if width and hidden and heads and not keys & {"head_dim", "qk_rope_head_dim"} and width * heads != hidden:
        raise UnsupportedError(
            f"{name}: head_dim is {width}, and mlx-lm's class takes {hidden} / {heads}", _HINT
        )
    usual_layers = [int((i + 1) % 4 != 0) for i in range(len(meant.no_rope_layers or []))]
    if meant.no_rope_layers and "no_rope_layers" not in keys and meant.no_rope_layers != usual_layers:
        raise UnsupportedError(f"{name}: no_rope_layers is not what mlx-lm's class computes", _HINT)


_HINT = "spqt converts what mlx-lm's own class can compute"


def _same(value: Any, usual: Any) -> bool:
    if isinstance(value, str) and isinstance(usual, str):
        return SAME.get(value, value) == SAME.get(usual, usual)
    if not value and not usual:  # null, false and an empty list leave it out alike
        return True
    return bool(value == usual)
