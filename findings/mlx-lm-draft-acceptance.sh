#!/usr/bin/env bash
# mlx-lm's speculative decoding keeps a draft only if it equals a token that it samples from the model on its own. With
# sampling, a draft of probability p under the model and q under the draft model is so kept with p, and over all drafts
# with the sum of p * q, where speculative sampling (arXiv 2211.17192) keeps it with min(1, p / q): of a model that
# drafts for itself, every draft. What is written has the model's distribution in both; what is lost is speed. Greedy
# decoding is not concerned.
# Exits 0 while fewer than half of the drafts of a model for itself are kept at temperature 3, 1 once they are.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
env/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.sample_utils import make_sampler

TOKENS = 400
mx.random.seed(0)
model = Model(ModelArgs(model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
                        num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=32))
mx.eval(model.parameters())
print("mlx", version("mlx"), "mlx-lm", version("mlx-lm"))
print("expected a model that drafts one token for itself has every draft kept, greedy and at temperature 3")
kept = {}
for name, temperature in (("greedy", 0.0), ("temperature 3", 3.0)):
    steps = speculative_generate_step(mx.array([1, 2, 3]), model, model, num_draft_tokens=1, max_tokens=TOKENS,
                                      sampler=make_sampler(temp=temperature))
    drafts = sum(from_draft for _, _, from_draft in steps)
    kept[name] = drafts / (TOKENS - drafts)
    print(f"seen {name}: {kept[name]:.0%} of the drafts kept")
sys.exit(0 if kept["greedy"] > 0.9 and kept["temperature 3"] < 0.5 else 1)
PYTHON
