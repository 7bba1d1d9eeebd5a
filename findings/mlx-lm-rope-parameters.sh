#!/usr/bin/env bash
# mlx-lm drops the rotary base of a llama config that the transformers installed beside it has written.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0
venv/bin/python - <<'PYTHON'
import json
import sys
from importlib.metadata import version

from mlx_lm.utils import _get_classes
from transformers import LlamaConfig

print("mlx-lm", version("mlx-lm"), "transformers", version("transformers"))
LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
).save_pretrained("model")
config = json.load(open("model/config.json"))
model_class, args_class = _get_classes(config)
base = model_class(args_class.from_dict(config)).model.layers[0].self_attn.rope.base
print("config.json:", {key: value for key, value in config.items() if "rope" in key})
print("expected: the model turns by the base 500000, or loading fails")
print("seen: the model turns by the base", base)
sys.exit(0 if base == 10000 else 1)
PYTHON
