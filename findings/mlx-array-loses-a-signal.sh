#!/usr/bin/env bash
# What a signal's handler raises is lost if it comes up inside mx.array: while a numpy array is converted, MLX's
# bindings try one type after another and clear the error of each try, and with it a KeyboardInterrupt. Python
# looks after signals between its own steps, not between the end of a product and the call that follows it. So
# in `mx.array(a @ b)` every Ctrl-C that comes during the product is lost, and a program that spends its time
# in such lines can't be ended. With `y = a @ b` and a function of Python's own called before mx.array, it ends.
# Exits 0 while all are lost, 1 once all are heard.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" "numpy==2.4.6"
env/bin/python - <<'PYTHON'
import signal
import sys
import time
from importlib.metadata import version

import mlx.core as mx
import numpy as np

TIMES = 20
a, b = np.ones((1024, 2048), np.float32), np.ones((2048, 8192), np.float32)


def convert(y):
    return mx.array(y)


def interrupt(number, frame):
    raise KeyboardInterrupt


signal.signal(signal.SIGALRM, interrupt)  # a Ctrl-C by the clock
taken = []
for _ in range(5):
    start = time.perf_counter()
    a @ b
    taken.append(time.perf_counter() - start)
quarter = min(taken) / 4
print("mlx", version("mlx"), "numpy", version("numpy"))
print(f"expected each of {TIMES} interrupts, a quarter into a product, to end it")
heard = {}
for name, line in (
    ("a @ b", lambda: a @ b),
    ("convert(a @ b)", lambda: convert(a @ b)),
    ("mx.array(a @ b)", lambda: mx.array(a @ b)),
):
    heard[name] = 0
    for _ in range(TIMES):
        signal.setitimer(signal.ITIMER_REAL, quarter)
        try:
            line()
            end = time.perf_counter() + quarter  # for one that came late
            while time.perf_counter() < end:
                pass
        except KeyboardInterrupt:
            heard[name] += 1
    print(f"seen, {name}: {heard[name]} heard")
found = heard["mx.array(a @ b)"]
sys.exit(0 if found == 0 and heard["convert(a @ b)"] == TIMES else 1 if found == TIMES else 2)
PYTHON
