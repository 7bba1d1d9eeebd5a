#!/usr/bin/env bash
# In MLX an array that one thread has built and not evaluated can't be evaluated by another, not even after
# the first has ended or while it waits: a graph belongs to the stream of the thread that built it. Work that
# is prepared in threads and joined in the main one has to be evaluated before it is handed over.
# Exits 0 while that raises, 1 once the value can be had.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4"
env/bin/python - <<'PYTHON'
import sys
import threading
from importlib.metadata import version

import mlx.core as mx

made = {}


def build() -> None:
    made["lazy"] = mx.ones(3) * 2
    made["evaluated"] = mx.ones(3) * 2
    mx.eval(made["evaluated"])


thread = threading.Thread(target=build)
thread.start()
thread.join()
print("mlx", version("mlx"))
print("expected both arrays to be [2, 2, 2] in the main thread")
print("seen, evaluated in its thread:", made["evaluated"].tolist())
try:
    print("seen, lazy:", made["lazy"].tolist())
except RuntimeError as error:
    print("seen, lazy: RuntimeError:", error)
    sys.exit(0)
sys.exit(1)
PYTHON
