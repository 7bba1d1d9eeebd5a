"""GGUF files read as HF checkpoints: `checkpoint.py` is the door, `file.py` reads the bytes.

`locate.py`, `config.py` and `rope.py` undo what GGUF converters do to names, settings and frequencies;
`vocabulary.py`, `bpe.py`, `sentencepiece.py` and `tokenizer.py` rebuild the tokenizer; `values.py` unpacks
weights. The third-party package `gguf` knows the block formats; its reader is not used (18 s on a large
vocabulary).
"""
