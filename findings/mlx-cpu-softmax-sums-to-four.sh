#!/usr/bin/env bash
# On the CPU MLX's softmax adds up a row in the row's own dtype. In bfloat16 the sum stops growing once it is
# some hundred times as large as what is added, so the probabilities of a vocabulary of 128,256 tokens add up
# to about four, and in float16 to two; `precise=True` gives one. cumsum does the same: the running sum of
# probabilities that add up to one ends near a third. sum and mean of the same array are right. Whoever
# compares such a probability with a limit, or cuts a tail by its running sum, has to go to float32 first.
# Exits 0 while softmax in bfloat16 adds up to more than 1.5, 1 once all are within 0.05 of one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4"
env/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx

mx.set_default_device(mx.cpu)
mx.random.seed(0)
print("mlx", version("mlx"), "on", mx.default_device())
print("expected every number to be 1, give or take the rounding of 16 bits")
print("dtype     tokens  softmax  precise  their sum by cumsum  by sum")
seen = {}
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    for tokens in (4096, 32000, 128256):
        logits = (2 * mx.random.normal((1, tokens))).astype(dtype)
        quick, precise = (mx.softmax(logits, axis=-1, precise=p) for p in (False, True))
        rising = mx.sort(precise, axis=-1)
        seen[dtype, tokens] = (
            quick.astype(mx.float32).sum().item(),
            precise.astype(mx.float32).sum().item(),
            mx.cumsum(rising, axis=-1)[0, -1].item(),
            rising.sum().item(),
        )
        name = str(dtype).removeprefix("mlx.core.")
        print(f"{name:8}  {tokens:6}  {'  '.join(f'{value:7.3f}' for value in seen[dtype, tokens])}")
worst = max(abs(value - 1) for values in seen.values() for value in values)
sys.exit(0 if seen[mx.bfloat16, 128256][0] > 1.5 else 1 if worst < 0.05 else 2)
PYTHON
