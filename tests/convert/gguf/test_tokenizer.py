"""Token ids of tokenizers rebuilt from .gguf files equal those of the originals on 1,000 odd lines.

Originals: a byte-level BPE put together here, or transformers' own class. The vocabularies are trained in
the tests.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from spqt_cli.convert.gguf import checkpoint as gguf
from spqt_cli.errors import SpqtError, UnsupportedError
from tests.lib.writing_gguf import WORDS, add_tokenizer, ids, load_tokenizer, odd_lines, write_file

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER = ["<think>", "</think>", "    "]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CORPUS = [*odd_lines(300, [], seed=7), *[" ".join(WORDS)] * 100]

# Written out from the originals' tokenizer.json, apart from the product's table.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cutter(pre: str) -> Any:
    """The pre-tokenizer of an original."""
    if pre == "llama-bpe":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"), level])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    return level


@cache
def bpe(pre: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges of a byte-level BPE, trained on text cut as this pre-tokenizer cuts it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cutter("llama-bpe" if pre == "qwen2" else pre)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tuple(tokens), tuple(tuple(pair) for pair in model["merges"])


def original(pre: str, tokens: list[str], merges: list[tuple[str, str]]) -> Any:
    """The tokenizer of which the file is made: transformers' class where it has one."""
    table = {token: i for i, token in enumerate(tokens)}
    if pre == "qwen2":
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer(vocab=table, merges=merges)
    elif pre == "gpt-2":
        from transformers import GPT2Tokenizer

        tokenizer = GPT2Tokenizer(vocab=table, merges=merges)
    else:
        tokenizer = Tokenizer(models.BPE(table, merges, ignore_merges=pre == "llama-bpe"))
        tokenizer.pre_tokenizer, tokenizer.decoder = cutter(pre), decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in SPECIAL) for t in [*SPECIAL, *USER]])
    return tokenizer


def write_bpe(folder: Path, pre: str | None, arch: str = "llama", **changes: Any) -> Path:
    """A file with the trained vocabulary of a pre-tokenizer and the special tokens after it."""
    words, merges = bpe(changes.get("trained", pre))
    tokens = [*words, *SPECIAL, *USER]
    types = [TokenType.NORMAL] * len(words) + [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] * 3
    writer = GGUFWriter(folder / "x.gguf", arch)
    writer.add_context_length(256)
    add_tokenizer(writer, "gpt2", pre, tokens, types, merges=[" ".join(pair) for pair in merges])
    writer.add_bos_token_id(len(words) + 1)
    writer.add_eos_token_id(len(words) + 2)
    writer.add_pad_token_id(len(words))
    writer.add_unk_token_id(len(words))
    writer.add_chat_template(TEMPLATE)
    changes.get("keys", lambda _: None)(writer)
    return write_file(writer, folder / "x.gguf")


def no_bos(writer: GGUFWriter) -> None:
    writer.add_add_bos_token(False)


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "smollm", "qwen2"])
def test_byte_level_ids_equal_the_original(tmp_path: Path, pre: str) -> None:
    arch = "qwen2" if pre == "qwen2" else "llama"
    trained = "gpt-2" if pre == "default" else pre
    words, merges = bpe(trained)
    wanted = original(trained, [*words, *SPECIAL, *USER], list(merges))
    path = write_bpe(tmp_path, pre, arch, trained=trained, keys=no_bos)
    found = load_tokenizer(path, tmp_path)
    lines = odd_lines(1000, [*SPECIAL, *USER], seed=2)
    assert len(lines) == 1000
    assert [line for line in lines if ids(found, line) != ids(wanted, line)] == []
    assert len({i for line in lines for i in ids(found, line)}) > 500  # of some 900
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [line for line in lines if raw.encode(line).ids != ids(wanted, line)] == []
    composed = normalizers.NFC() if pre == "qwen2" else normalizers.Sequence([])
    for line in lines[:200]:
        assert found.decode(ids(found, line)) == composed.normalize_str(line)


def test_the_pre_tokenizers_differ_on_the_lines(tmp_path: Path) -> None:
    """One vocabulary, four ways to cut: unless the lines tell them apart, the test above shows nothing."""
    lines = odd_lines(1000, [], seed=2)
    found = set()
    for pre in ("gpt-2", "llama-bpe", "smollm"):
        folder = tmp_path / pre
        folder.mkdir()
        tokenizer = load_tokenizer(write_bpe(folder, pre, trained="gpt-2", keys=no_bos), folder)
        found.add(str([ids(tokenizer, line) for line in lines]))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("keys", "before", "after"),
    [
        ({}, 1, 0),  # llama-bpe adds bos unless the file says otherwise
        ({"bos": False}, 0, 0),
        ({"bos": True, "eos": True}, 1, 1),
    ],
)
def test_bos_and_eos_flags(tmp_path: Path, keys: dict[str, bool], before: int, after: int) -> None:
    def add(writer: GGUFWriter) -> None:
        for name, value in keys.items():
            writer.add_bool(f"tokenizer.ggml.add_{name}_token", value)

    tokenizer = load_tokenizer(write_bpe(tmp_path, "llama-bpe", keys=add), tmp_path)
    inner = tokenizer.encode("fox", add_special_tokens=False)
    framed = [tokenizer.bos_token_id] * before + inner + [tokenizer.eos_token_id] * after
    assert ids(tokenizer, "fox") == framed


def test_template_and_special_tokens_come_through(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_bpe(tmp_path, "qwen2", "qwen2"), tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    names = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    assert names == ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|endoftext|>"]
    assert len(tokenizer) == len(bpe("qwen2")[0]) + 6


def test_mlx_lm_streams_what_the_tokenizer_decodes(tmp_path: Path) -> None:
    from mlx_lm.tokenizer_utils import load as load_wrapped

    load_tokenizer(write_bpe(tmp_path, "smollm"), tmp_path)
    wrapped = load_wrapped(tmp_path, eos_token_ids=[1])
    line = "the quick 👩‍👩‍👧 brown  fox\n½ 日本"
    detokenizer = wrapped.detokenizer
    for token in wrapped.encode(line):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == line


def test_turn_ends_of_the_template_end_a_text(tmp_path: Path) -> None:
    """A file whose eos ends a text, with a template whose turns end otherwise."""

    def other_eos(writer: GGUFWriter) -> None:
        for data in writer.kv_data:
            data.pop("tokenizer.ggml.eos_token_id", None)
        writer.add_eos_token_id(len(bpe("smollm")[0]))

    path = write_bpe(tmp_path, "smollm", keys=other_eos)
    gguf.write_tokenizer(path, tmp_path)
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [len(bpe("smollm")[0]), len(bpe("smollm")[0]) + 2]


def test_named_templates_are_kept(tmp_path: Path) -> None:
    def keys(writer: GGUFWriter) -> None:
        writer.add_string("tokenizer.chat_template.../../tool_use", "tools {{ messages[0].content }}")

    tokenizer = load_tokenizer(write_bpe(tmp_path, "smollm", keys=keys), tmp_path)
    message = [{"role": "user", "content": "hi"}]
    named = tokenizer.apply_chat_template(message, chat_template="../../tool_use", tokenize=False)
    assert named == "tools hi"
    assert {path.name for path in tmp_path.parent.iterdir() if path.suffix == ".jinja"} == set()


@pytest.mark.parametrize("pre", ["tekken", "falcon", "gpt-4o", "deepseek-coder", None])
def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path, pre: str | None) -> None:
    path = write_bpe(tmp_path, pre, trained="gpt-2")
    with pytest.raises(UnsupportedError, match=repr(pre) if pre else r"no tokenizer\.ggml\.pre"):
        gguf.write_tokenizer(path, tmp_path)


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "none"])
def test_an_unknown_kind_is_refused(tmp_path: Path, kind: str) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    add_tokenizer(writer, kind, "default", ["a"], [TokenType.NORMAL])
    with pytest.raises(UnsupportedError, match=repr(kind)):
        gguf.write_tokenizer(write_file(writer, tmp_path / "x.gguf"), tmp_path)


FAULTS: dict[str, tuple[Any, str]] = {
    "a token id out of range": (
        lambda w: w.add_uint32("tokenizer.ggml.eot_token_id", 1 << 20),
        "eot_token_id",
    ),
    "a flag that is a number": (lambda w: w.add_uint32("tokenizer.ggml.add_eos_token", 1), "add_eos_token"),
    "a table of characters": (
        lambda w: w.add_array("tokenizer.ggml.precompiled_charsmap", [1, 2]),
        "precompiled_charsmap",
    ),
    "a separator": (lambda w: w.add_bool("tokenizer.ggml.add_sep_token", True), "add_sep_token"),
    "too few scores": (lambda w: w.add_array("tokenizer.ggml.scores", [1.0, 2.0]), "scores"),
    "a template that is a number": (lambda w: w.add_uint32("tokenizer.chat_template.x", 1), "chat_template"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_key_that_does_not_fit_is_named(tmp_path: Path, fault: str) -> None:
    keys, words = FAULTS[fault]
    path = write_bpe(tmp_path, "smollm", keys=keys)
    with pytest.raises(SpqtError, match=words) as caught:
        gguf.write_tokenizer(path, tmp_path)
    assert str(path) in caught.value.cause


def _writer(folder: Path, tokens: list[str], merges: list[str]) -> Path:
    writer = GGUFWriter(folder / "x.gguf", "llama")
    add_tokenizer(writer, "gpt2", "gpt-2", tokens, [TokenType.NORMAL] * len(tokens), merges=merges)
    return write_file(writer, folder / "x.gguf")


@pytest.mark.parametrize(
    ("tokens", "merges", "words"),
    [
        (["a", "b", "ab"], ["a b", "a c"], "merges don't fit"),
        (["a", "b", "ab"], ["a b c"], "not two tokens"),
        (["a", "b", "ab"], ["ab"], "not two tokens"),
        (["a", "b", "a"], ["a b"], "twice"),
        (["a", "b"], [], "lacks tokenizer.ggml.merges"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_named(
    tmp_path: Path, tokens: list[str], merges: list[str], words: str
) -> None:
    with pytest.raises(SpqtError, match=words):
        gguf.write_tokenizer(_writer(tmp_path, tokens, merges), tmp_path)
