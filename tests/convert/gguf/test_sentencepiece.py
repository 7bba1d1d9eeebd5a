"""Token ids of tokenizers rebuilt from .gguf files equal those of the `sentencepiece` library.

The models are trained in the tests, with each combination of flags that a file can state.
"""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFWriter, TokenType

from spqt_cli.errors import SpqtError, UnsupportedError
from tests.lib.writing_gguf import WORDS, add_tokenizer, ids, load_tokenizer, odd_lines, write_file

CONTROL = ["<s>", "</s>", "<unk>", "<|user|>"]
SPACES = ["▁▁", "▁▁▁", "\n\n", "<tag>", "<tag2>"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"prefix": True},
    "llama with user-defined tokens": {"prefix": True, "user": ["<tag>", "<tag2>"]},
    "gemma": {"prefix": False, "user": SPACES},
    "gemma, spaces as signs": {"prefix": False, "user": SPACES, "signs": True},
    "spaces removed": {"prefix": True, "trims": True, "user": ["<tag>"]},
    "spaces removed, no prefix": {"prefix": False, "trims": True},
    "no byte fallback": {"prefix": True, "byte_fallback": False},
}


def train(kind: dict[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model with the flags of a kind."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*odd_lines(600, [], seed=5), *[" ".join(WORDS)] * 300]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        character_coverage=0.98,
        normalization_rule_name="identity",
        byte_fallback=kind.get("byte_fallback", True),
        add_dummy_prefix=kind["prefix"],
        remove_extra_whitespaces=kind.get("trims", False),
        user_defined_symbols=kind.get("user", []),
        control_symbols=["<|user|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def token_type(model: sentencepiece.SentencePieceProcessor, i: int, user: list[str]) -> TokenType:
    """As the converter tells the types."""
    if model.id_to_piece(i) in user:
        return TokenType.USER_DEFINED
    asked = ((model.is_unknown, TokenType.UNKNOWN), (model.is_control, TokenType.CONTROL))
    asked += ((model.is_unused, TokenType.UNUSED), (model.is_byte, TokenType.BYTE))
    return next((kind for is_kind, kind in asked if is_kind(i)), TokenType.NORMAL)


def write_sentencepiece(
    folder: Path, model: sentencepiece.SentencePieceProcessor, kind: dict[str, Any], arch: str = "llama"
) -> Path:
    """A file with that model's pieces; user-defined ones with plain spaces, as the converter has them."""
    every = range(model.get_piece_size())
    types = [token_type(model, i, kind.get("user", [])) for i in every]
    tokens = [model.id_to_piece(i) for i in every]
    if not kind.get("signs"):
        user = kind.get("user", [])
        tokens = [token.replace("▁", " ") if token in user else token for token in tokens]
    writer = GGUFWriter(folder / "x.gguf", arch)
    writer.add_context_length(256)
    scores = [model.get_score(i) for i in every]
    add_tokenizer(writer, "llama", "default", tokens, types, scores=scores)
    for name, i in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unk", model.unk_id())):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_space_prefix(kind["prefix"])
    writer.add_remove_extra_whitespaces(kind.get("trims", False))
    kind.get("keys", lambda _: None)(writer)
    return write_file(writer, folder / "x.gguf")


def reference(model: sentencepiece.SentencePieceProcessor, line: str) -> list[int]:
    """bos, then each stretch between control tokens by the library, which does not look for those."""
    found = [model.bos_id()]
    for part in re.split("(" + "|".join(map(re.escape, CONTROL)) + ")", line):
        found += [model.piece_to_id(part)] if part in CONTROL else model.encode(part)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_sentencepiece_ids_equal_the_library(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    model = train(kind)
    arch = "gemma3" if name.startswith("gemma") else "llama"
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, kind, arch), tmp_path)
    user = kind.get("user", [])
    lines = odd_lines(1000, [*CONTROL, *user, *(u.replace("▁", " ") for u in user)], seed=1)
    assert [line for line in lines if ids(tokenizer, line) != reference(model, line)] == []
    if kind.get("byte_fallback", True) and not kind.get("trims"):
        texts = [line for line in odd_lines(200, [], seed=3) if "▁" not in line]
        assert [
            t for t in texts if tokenizer.decode(tokenizer.encode(t, add_special_tokens=False)) != t
        ] == []


def test_a_sentencepiece_file_without_flags_has_prefix_and_bos(tmp_path: Path) -> None:
    def no_flags(writer: GGUFWriter) -> None:
        for data in writer.kv_data:
            for key in ("add_space_prefix", "remove_extra_whitespaces", "bos_token_id", "eos_token_id"):
                data.pop(f"tokenizer.ggml.{key}", None)

    kind = KINDS["llama"] | {"keys": no_flags}
    model = train(kind)
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, kind), tmp_path)
    assert ids(tokenizer, "the fox") == [1, *model.encode("the fox")]
    assert model.id_to_piece(model.encode("the fox")[0]).startswith("▁")


def test_an_unused_piece_that_would_be_joined_is_refused(tmp_path: Path) -> None:
    kind = KINDS["llama"]
    model = train(kind)
    victim = next(model.id_to_piece(i) for i in range(300, 1500) if len(model.id_to_piece(i)) > 3)

    def unused(writer: GGUFWriter) -> None:
        for data in writer.kv_data:
            if (types := data.get("tokenizer.ggml.token_type")) is not None:
                types.value[model.piece_to_id(victim)] = TokenType.UNUSED

    with pytest.raises(UnsupportedError, match="unused"):
        load_tokenizer(write_sentencepiece(tmp_path, model, kind | {"keys": unused}), tmp_path)


def test_scores_that_order_nothing_are_refused(tmp_path: Path) -> None:
    def flat(writer: GGUFWriter) -> None:
        for data in writer.kv_data:
            if (scores := data.get("tokenizer.ggml.scores")) is not None:
                scores.value[:] = [-1000.0] * len(scores.value)

    kind = KINDS["llama"] | {"keys": flat}
    with pytest.raises(SpqtError, match="join first"):
        load_tokenizer(write_sentencepiece(tmp_path, train(kind), kind), tmp_path)
