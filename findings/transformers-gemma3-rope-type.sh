#!/usr/bin/env bash
# transformers ignores the rope_scaling of a gemma3 config that spells its kind `type`, as older configs do.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q transformers==5.24.0
venv/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

from transformers import Gemma3TextConfig, LlamaConfig

print("transformers", version("transformers"))
old, new = ({name: "linear", "factor": 8.0} for name in ("type", "rope_type"))
llama = LlamaConfig(rope_scaling=dict(old)).rope_parameters["rope_type"]
kinds = [Gemma3TextConfig(rope_scaling=dict(each)).rope_parameters["full_attention"]["rope_type"] for each in (old, new)]
print("expected: both spellings give linear, as for llama:", llama)
print("seen: gemma3_text gives", dict(zip(("type", "rope_type"), kinds)))
sys.exit(0 if llama == "linear" and kinds == ["default", "linear"] else 1)
PYTHON
