#!/usr/bin/env bash
# mlx-lm: an architecture that can't be loaded raises SystemExit and prints on stdout. Others raise ValueError, so
# `except Exception` around a load is not enough.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
mkdir model
cat > model/config.json <<'JSON'
{"model_type": "olmo", "d_model": 64, "n_layers": 1, "mlp_hidden_size": 128, "n_heads": 4, "vocab_size": 64,
 "embedding_size": 64}
JSON
cat > try.py <<'PY'
import contextlib
import io
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

mx.save_safetensors("model/model.safetensors", {"x": mx.zeros(1)})
said = io.StringIO()
try:
    with contextlib.redirect_stdout(said):
        load_model(Path("model"))
    seen = "no error"
except Exception as error:
    seen = f"an exception, {type(error).__name__}"
except SystemExit as error:
    seen = f"SystemExit({error.code}), stdout {said.getvalue().strip()!r}"
print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("expected: an exception (ImportError or ValueError) that `except Exception` catches")
print(f"seen:     {seen}")
raise SystemExit(0 if seen.startswith("SystemExit(1)") and "ai2-olmo" in seen else 1)
PY
venv/bin/python try.py
