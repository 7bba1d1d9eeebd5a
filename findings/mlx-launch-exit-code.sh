#!/usr/bin/env bash
# mlx.launch returns 0 when the program that it launched failed in every process; the code of each process is a warning
# in its output. So a script that goes on "if mlx.launch succeeded" goes on after a failure.
# Exits 0 while mlx.launch returns 0 for processes that all exit with 4, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4"
env/bin/python -c 'from importlib.metadata import version; print("mlx", version("mlx"))'
echo "import sys; sys.exit(4)" > fails.py
echo "expected mlx.launch returns another code than 0 when both processes exit with 4"
code=0
PATH="$work/env/bin:$PATH" mlx.launch -n 2 -- "$work/env/bin/python" fails.py > output 2>&1 || code=$?
echo "seen it returns $code, and warns $(grep -c 'exited with code 4' output) times"
[ "$code" = 0 ] && grep -q "exited with code 4" output
