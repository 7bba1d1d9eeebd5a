#!/usr/bin/env bash
# transformers 5 rebuilds some tokenizers from a class and drops the pre-tokenizer of tokenizer.json.
# One would expect AutoTokenizer to give what tokenizer.json says, as `tokenizers` does. Exits 1 if it does now.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q transformers==5.24.0 tokenizers==0.23.3
cat > run.py <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

signs = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({s: i for i, s in enumerate([*signs, "ab"])}, [("a", "b")]))
letters = pre_tokenizers.Split(tokenizers.Regex("."), behavior="isolated")  # each sign alone, so that no merge acts
made.pre_tokenizer = pre_tokenizers.Sequence([letters, pre_tokenizers.ByteLevel(False, use_regex=False)])
made.decoder = decoders.ByteLevel()


def load(model_type, named):
    folder = Path(f"{model_type}-{named}")
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    return AutoTokenizer.from_pretrained(folder)


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
cut = ["llama GPT2Tokenizer", "llama CohereTokenizer", "llama GPTNeoXTokenizer"]
right_by = ["llama TokenizersBackend", "qwen3 TokenizersBackend"]
# For qwen2 the class is taken whatever is named, TokenizersBackend included.
kept_out = ["qwen2 Qwen2Tokenizer", "qwen2 TokenizersBackend", "qwen3_5 TokenizersBackend"]
print("tokenizer.json, 'xab':", made.encode("xab").tokens)
as_before = True
for case in [*cut, *kept_out, *right_by]:
    tokenizer = load(*case.split())
    seen = tokenizer.convert_ids_to_tokens(tokenizer.encode("xab", add_special_tokens=False))
    expected = made.encode("xab").tokens
    print(f"{case}: loaded as {type(tokenizer).__name__}, expected {expected}, seen {seen}")
    as_before &= (seen == expected) == (case in right_by)
print("as described" if as_before else "the behaviour has changed")
sys.exit(not as_before)
PYTHON
venv/bin/python run.py
