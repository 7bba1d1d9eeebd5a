#!/usr/bin/env bash
# mlx-lm's streaming detokenizers take an answer for the beginning of a text and drop its first space.
# One would expect the pieces of an answer, put after the prompt, to be what the tokenizer decodes of both.
# Exits 1 if they are now.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
case $(uname -s) in Darwin) mlx=mlx==0.32.4 ;; *) mlx='mlx[cpu]==0.32.4' ;; esac
venv/bin/pip install -q "$mlx" mlx-lm==0.32.2 transformers==5.24.0 tokenizers==0.23.3
cat > run.py <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

signs = sorted(pre_tokenizers.ByteLevel.alphabet())
byte_level = Tokenizer(models.BPE({s: i for i, s in enumerate(signs)}, []))
byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(False)
byte_level.decoder = decoders.ByteLevel()

pieces = Tokenizer(models.BPE({s: i for i, s in enumerate(["<unk>", "▁", "a", "b", "c"])}, [], unk_token="<unk>"))
pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
pieces.decoder = decoders.Sequence(steps)  # as in tokenizer.json of Llama 2

print("mlx-lm", version("mlx-lm"), "transformers", version("transformers"))
as_before = True
for name, made in {"byte-level": byte_level, "sentencepiece": pieces}.items():
    folder = Path(name)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load(folder)
    prompt = tokenizer.encode("a")
    answer = tokenizer.encode("a bc")[len(prompt) :]
    expected = tokenizer.decode(prompt + answer)[len(tokenizer.decode(prompt)) :]
    detokenizer = tokenizer.detokenizer  # as stream_generate uses it
    for token in answer:
        detokenizer.add_token(token)
    detokenizer.finalize()
    seen = detokenizer.text
    print(f"{name}, {type(detokenizer).__name__}: expected {expected!r} after 'a', seen {seen!r}")
    as_before &= expected == " bc" and seen == "bc"
print("as described" if as_before else "the behaviour has changed")
sys.exit(not as_before)
PYTHON
venv/bin/python run.py
