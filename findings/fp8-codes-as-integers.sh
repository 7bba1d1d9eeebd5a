#!/usr/bin/env bash
# MLX loads F8_E4M3 tensors as uint8, and mlx-lm's class for Ministral 3 multiplies those codes with the
# scale, as if they were the numbers that they stand for. Its other FP8 classes call mx.from_fp8 first.
# Makes a weight as such checkpoints store it (one scale for a tensor, `weight_scale_inv`) and asks the
# class's own `sanitize` for it. Exits 0 while the values are wrong, 1 once they are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" mlx-lm==0.32.2 safetensors
env/bin/python - <<'PYTHON'
import json
import struct
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models.ministral3 import Model, ModelArgs

args = ModelArgs.from_dict(dict(
    model_type="ministral3", hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1,
    rms_norm_eps=1e-5, vocab_size=8, head_dim=8, num_key_value_heads=1, max_position_embeddings=8,
    rope_parameters=dict(rope_theta=1e4, llama_4_scaling_beta=0.1, original_max_position_embeddings=8),
    tie_word_embeddings=True))
name = "model.layers.0.mlp.up_proj.weight"
truth = mx.array([[1.0, -1.0, 0.5, -0.5]])
data = bytes(memoryview(mx.to_fp8(truth))) + struct.pack("<f", 2.0)
header = json.dumps({
    name: {"dtype": "F8_E4M3", "shape": [1, 4], "data_offsets": [0, 4]},
    name + "_scale_inv": {"dtype": "F32", "shape": [], "data_offsets": [4, 8]},
}).encode()
with open("model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + data)
loaded = mx.load("model.safetensors")
found = Model(args).sanitize(dict(loaded))[name].astype(mx.float32)
expected = truth * 2.0
print("mlx", version("mlx"), "mlx-lm", version("mlx-lm"), "loaded as", loaded[name].dtype)
print("expected", expected.tolist())
print("seen    ", found.tolist())
sys.exit(0 if not mx.allclose(found, expected) else 1)
PYTHON
