#!/usr/bin/env bash
# mlx-lm's DoRA does not fit layers that are quantized to 3, 5 or 6 bits, as its LoRA does: it multiplies the packed
# width by a whole number of codes in a word, 32 // bits, where codes run on from word to word, so the adapter is
# made for 960 of 1,024 inputs and the layer's first call fails. With 2, 4 and 8 bits, which divide
# 32, both work.
# Exits 0 while DoRA fails for a width at which LoRA works, 1 once it doesn't.
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
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

INPUTS = 1024
print("mlx", version("mlx"), "mlx-lm", version("mlx-lm"))
print("expected LoRA and DoRA on a quantized layer of", INPUTS, "inputs, at every width that MLX quantizes to")
x = mx.random.normal((1, INPUTS))
failed = {}
for bits in (2, 3, 4, 5, 6, 8):
    layer = nn.QuantizedLinear(INPUTS, 64, group_size=64, bits=bits)
    seen = []
    for kind in (LoRALinear, DoRALinear):
        adapted = kind.from_base(layer, r=4)
        try:
            mx.eval(adapted(x))
            works = True
        except ValueError:
            works = False
        seen.append(f"{kind.__name__} of {adapted.lora_a.shape[0]} inputs {'works' if works else 'fails'}")
        failed[kind, bits] = not works
    print(f"{bits} bits:", ", ".join(seen))
wrong = [bits for kind, bits in failed if kind is DoRALinear and failed[kind, bits] and not failed[LoRALinear, bits]]
sys.exit(0 if wrong else 1)
PYTHON
