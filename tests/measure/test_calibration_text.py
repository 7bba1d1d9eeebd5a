"""Checks the text that `spqt calibrate` reads when the user names none.

Knows the form of the file (documents, turns, kinds) and nothing about calibration itself.
"""

import re
import unicodedata

import pytest

from tests import ROOT

TEXT_FILE = ROOT / "configs" / "calibration.txt"
SEPARATOR = "<|document|>"
TURN_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
FIRST_BYTES = 8 * 1024  # about 2,048 tokens: the least that calibrate may be given

# A line that begins or ends so is code: a keyword, a comment mark, a tag, or closing punctuation.
CODE_LINE = re.compile(
    r"^\s*(#|//|/\*|--|@@|[-+] |</?\w|def |import |from \w+ import|return\b|fn |let |use |const |export |"
    r"for |if |type |CREATE |SELECT |WITH |run:|\w+=)|[;{}()\[\]:>]$"
)
TABLE_LINE = re.compile(r'^\s*(\|.*\|$|"\w+": |\d{4}-\d\d-\d\d \d\d:|\w[^,]*,\d{4}-\d\d-\d\d,)')
REASONING = re.compile(r"Step 1|\*\*Claim\.|step by step|Find all|How many ways")
FOREIGN_WORDS = re.compile(
    r"\b(und|nicht|der|die|wird|les|est|qui|que|una|il|che|uma|não|por)\b", re.IGNORECASE
)


@pytest.fixture(scope="module")
def data() -> bytes:
    return TEXT_FILE.read_bytes()


@pytest.fixture(scope="module")
def documents(data: bytes) -> list[str]:
    return split_documents(data.decode("utf-8"))


def split_documents(text: str) -> list[str]:
    """Return the documents of `text`, without the separator lines."""
    return re.split(rf"^{re.escape(SEPARATOR)}\n", text, flags=re.MULTILINE)


def turns_of(document: str) -> list[tuple[str, str]]:
    """Return (mark, text) for each turn of a dialogue; empty for a plain document."""
    marks = "|".join(map(re.escape, TURN_MARKS))
    parts = re.split(rf"^({marks})\n", document, flags=re.MULTILINE)
    if len(parts) == 1:
        return []
    assert parts[0] == "", f"text before the first turn: {parts[0][:60]!r}"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def is_foreign(document: str) -> bool:
    """Return whether `document` is in another language than English."""
    letters = [c for c in document if c.isalpha()]
    other_script = sum(not unicodedata.name(c).startswith("LATIN") for c in letters)
    words = re.findall(r"\w+", document)
    return other_script > 0.5 * len(letters) or len(FOREIGN_WORDS.findall(document)) > 0.04 * len(words)


def share_of_lines(pattern: re.Pattern[str], document: str) -> float:
    lines = [line for line in document.splitlines() if line.strip()]
    return sum(bool(pattern.search(line)) for line in lines) / len(lines)


def kind_of(document: str) -> str:
    """Return the kind of `document`: language, reasoning, dialogue, code, table or prose."""
    if is_foreign(document):
        return "language"
    if REASONING.search(document):
        return "reasoning"
    if turns_of(document):
        return "dialogue"
    if share_of_lines(TABLE_LINE, document) > 0.4:
        return "table"
    return "code" if share_of_lines(CODE_LINE, document) > 0.3 else "prose"


def bytes_by_kind(documents: list[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for document in documents:
        kind = kind_of(document)
        sizes[kind] = sizes.get(kind, 0) + len(document.encode())
    return sizes


KINDS = {"prose", "dialogue", "code", "table", "reasoning", "language"}


def test_size(data: bytes) -> None:
    assert 40_000 <= len(data) <= 60_000


def test_text_is_nfc_with_unix_line_ends(data: bytes) -> None:
    text = data.decode("utf-8")
    assert unicodedata.is_normalized("NFC", text)
    assert text.endswith("\n")
    stray = {c for c in text if unicodedata.category(c) in ("Cc", "Co", "Cn") and c != "\n"}
    assert not stray | ({"\ufeff", "\ufffd"} & set(text))


def test_no_long_or_ragged_line(data: bytes) -> None:
    for line in data.decode("utf-8").split("\n"):
        assert len(line) <= 1200, line[:60]
        assert line == line.rstrip(), line


def test_documents_are_not_empty(documents: list[str]) -> None:
    assert len(documents) >= 40
    for document in documents:
        assert len(document.strip()) > 200, document
        assert document == document.strip("\n") + "\n"


def test_no_document_twice(documents: list[str]) -> None:
    assert len({" ".join(document.split()).casefold() for document in documents}) == len(documents)


def test_no_sentence_twice(documents: list[str]) -> None:
    """A long line that comes back would count its activations twice."""
    lines = [line.strip() for document in documents for line in document.splitlines()]
    long_lines = [line for line in lines if len(line) > 60]
    assert len(set(long_lines)) == len(long_lines)


def test_marks_stand_alone(data: bytes) -> None:
    """A mark inside a line, or one we don't define, would reach the model as text."""
    for line in data.decode("utf-8").split("\n"):
        assert line in (SEPARATOR, *TURN_MARKS) or not re.search(r"<\|\w*\|>", line), line


def test_turns_alternate(documents: list[str]) -> None:
    dialogues = [turns for turns in map(turns_of, documents) if turns]
    assert len(dialogues) >= 10
    for turns in dialogues:
        marks = [mark for mark, _ in turns]
        spoken = marks[1:] if marks[0] == "<|system|>" else marks
        assert len(spoken) % 2 == 0, "the last turn must be the assistant's"
        assert spoken == ["<|user|>", "<|assistant|>"] * (len(spoken) // 2), turns[0][1]
        assert all(text.strip() for _, text in turns), marks


def test_system_turns_are_covered(documents: list[str]) -> None:
    starts = [turns[0][0] for turns in map(turns_of, documents) if turns]
    assert starts.count("<|system|>") >= 2
    assert starts.count("<|user|>") > starts.count("<|system|>")


def test_first_8_kib_hold_every_kind(data: bytes) -> None:
    head = data[:FIRST_BYTES].decode("utf-8", errors="ignore")
    complete = split_documents(head)[:-1]  # the last one is cut off
    assert set(bytes_by_kind(complete)) == KINDS


def test_every_quarter_mixes_kinds(documents: list[str]) -> None:
    """Held-out text may be any stretch of the file, so none may lack a main kind."""
    quarter = len(documents) // 4
    for start in range(0, 4 * quarter, quarter):
        kinds = set(bytes_by_kind(documents[start : start + quarter]))
        assert kinds == KINDS, f"documents from {start}: only {sorted(kinds)}"


def test_shares_of_kinds(documents: list[str]) -> None:
    """Shares in per cent; the bounds are the planned share, give or take about a quarter."""
    planned = {"prose": 35, "dialogue": 20, "code": 20, "table": 8, "reasoning": 5, "language": 12}
    sizes = bytes_by_kind(documents)
    total = sum(sizes.values())
    for kind, percent in planned.items():
        share = 100 * sizes[kind] / total
        assert abs(share - percent) <= max(2, percent / 4), f"{kind}: {share:.1f} %, planned {percent} %"


@pytest.mark.parametrize("script", ["CJK", "HIRAGANA", "CYRILLIC", "ARABIC", "DEVANAGARI"])
def test_scripts(data: bytes, script: str) -> None:
    letters = [c for c in data.decode("utf-8") if c.isalpha()]
    assert sum(unicodedata.name(c).startswith(script) for c in letters) >= 20


def test_no_address_or_telephone_number(data: bytes) -> None:
    text = data.decode("utf-8")
    assert not re.findall(r"\w@\w+\.\w+|https?://", text)
    assert not re.findall(r"(?:\+|\b0)\d(?:[ -]?\d){7,}", text)
