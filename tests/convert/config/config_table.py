"""The table of docs/config-keys.md: which keys each class of the installed mlx-lm reads.

python -m tests.convert.config.config_table > docs/config-keys.md
"""

import contextlib
import io
import pkgutil

import mlx_lm.models
from mlx_lm import utils

from spqt_cli.convert.config import config_keys

WATCHED = {
    "base": ("rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant"),
    "scaling": ("rope_scaling",), "rope_parameters": ("rope_parameters",),
    "share turned": ("partial_rotary_factor", "rotary_pct", "rotary_dim", "partial_rotary_factors"),
    "local base": ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta", "compress_rope_theta"),
    "window": ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"),
    "layers' types": ("layer_types", "sliding_window_pattern", "full_attention_interval", "no_rope_layers",
                      "hybrid_layer_pattern", "layers_block_type"),
    "tied": ("tie_word_embeddings",), "biases": ("attention_bias", "use_bias", "use_qkv_bias", "qkv_bias"),
    "softcaps": ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"),
}  # fmt: skip
INTRODUCTION = """# Keys of config.json

`convert` writes what transformers means by a config into the converted `config.json`, in the keys that
mlx-lm's class reads. The built model is then compared with it. Rotary positions and windows that the class
does not have are noted in the `spqt` section and added when the model is loaded. Another key that changes
results and would be dropped is refused by name (exit 4). A model that is right only up to a length
(longrope, chunked attention) is limited to it. `make fuzz-configs` tries 2,000 configs of twelve families
against decoders written from their definitions.

The table marks where the class reads a key of that kind. `python -m tests.convert.config.config_table`
prints this page.
"""


def rows() -> list[tuple[str, list[str]]]:
    """(architecture, kinds of keys read) of every module that can be imported."""
    found = []
    for module in sorted(pkgutil.iter_modules(mlx_lm.models.__path__), key=lambda one: one.name.lower()):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some say which package they miss
                _, args_class = utils._get_classes({"model_type": module.name})
        except (ValueError, AttributeError, SystemExit):  # helpers, and one that wants another package
            continue
        keys = config_keys.reads(args_class)
        found.append((module.name, [kind for kind, names in WATCHED.items() if keys & set(names)]))
    return found


def text() -> str:
    lines = [
        INTRODUCTION,
        "| architecture | " + " | ".join(WATCHED) + " |",
        "|---" * (len(WATCHED) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join("x" if kind in kinds else "" for kind in WATCHED) + " |"
              for name, kinds in rows()]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")
