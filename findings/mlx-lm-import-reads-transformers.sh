#!/usr/bin/env bash
# `import mlx_lm` reads the source text of some 1,700 modules of transformers, nearly all of them twice, and imports
# few of them: transformers scans its folder of models for names in each process, and keeps nothing of it. It is
# the larger part of what the import takes, so every command and every test that starts a process pays it.
# Counts the .py files that are opened as text. Exits 0 while there are more than a thousand, 1 once there are fewer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0
env/bin/python -c "import mlx_lm" # compiles what is imported, so that below no source is read for that
env/bin/python - <<'PYTHON'
import collections
import os
import sys
import time

opened = collections.Counter()


def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".py"):
        opened[str(arguments[0])] += 1


sys.addaudithook(watch)
began = time.perf_counter()
import mlx_lm  # noqa: F401

took = time.perf_counter() - began
from importlib.metadata import version

here = os.path.join(os.path.dirname(sys.modules["transformers"].__file__), "")
texts = {path: count for path, count in opened.items() if path.startswith(here)}
imported = {getattr(one, "__file__", None) for one in list(sys.modules.values())}
megabytes = sum(os.path.getsize(path) * count for path, count in texts.items()) / 1e6
print("mlx-lm", version("mlx-lm"), "transformers", version("transformers"))
print("expected: compiled modules of what is imported, no source text")
print(f"seen: {len(texts)} sources opened {sum(texts.values())} times, {megabytes:.0f} MB; "
      f"{len(imported & set(texts))} of these modules are imported; the import took {took:.1f} s")
sys.exit(0 if len(texts) > 1000 else 1)
PYTHON
