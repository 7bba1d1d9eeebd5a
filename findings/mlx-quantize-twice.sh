#!/usr/bin/env bash
# MLX's affine mx.quantize does not give back a matrix that lies on its own grid: dequantized and quantized
# again, with the same bits and groups, an eighth of a 4-bit matrix's weights change and its squared error
# grows by an eighth; with 8 bits in bfloat16 it doubles. A grid is laid so that zero is one of its values,
# from the larger edge inwards, so the other edge of a group is no longer one of the values, and the next
# grid is another. Whoever dequantizes a model to fuse an adapter or to change its layout, and quantizes it
# again, loses twice.
# Exits 0 while weights change, 1 once they don't.
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

mx.random.seed(0)
print("mlx", version("mlx"))
print("expected no weight to change when a matrix is quantized again from its dequantized values")
print("bits  dtype     weights changed  squared error, times the first")
changed = []
for bits in (2, 3, 4, 5, 6, 8):
    for dtype in (mx.float32, mx.bfloat16):
        w = (0.05 * mx.random.normal((512, 2048))).astype(dtype)
        first = mx.dequantize(*mx.quantize(w, 64, bits), 64, bits)
        again = mx.dequantize(*mx.quantize(first, 64, bits), 64, bits)

        def error(made, w=w):
            return float(((made.astype(mx.float32) - w.astype(mx.float32)) ** 2).mean())

        changed.append(float((first != again).astype(mx.float32).mean()))
        name = str(dtype).removeprefix("mlx.core.")
        print(f"{bits:4}  {name:8}  {changed[-1]:15.1%}  {error(again) / error(first):.2f}")
print("seen, at most:", f"{max(changed):.1%}")
sys.exit(0 if max(changed) > 0.05 else 1)
PYTHON
