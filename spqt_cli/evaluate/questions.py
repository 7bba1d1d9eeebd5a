"""Multiple-choice questions from a local JSONL file, in HellaSwag's or PIQA's shape.

    {"ctx": "...", "endings": ["...", ...], "label": 0}     HellaSwag; also activity_label, ctx_a, ctx_b
    {"goal": "...", "sol1": "...", "sol2": "...", "label": 0}     PIQA

Labels may stand in a file of their own, a line each, as PIQA is published: X-labels.lst next to X.jsonl.
A question becomes a context and endings, worded as lm-eval words these two tasks, so that results can be
held against published ones. It knows nothing of models.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.system import files

LINE_BYTES = 1 << 20
MOST_ENDINGS = 64
SHAPES = (
    'a line is {"ctx", "endings", "label"} or {"goal", "sol1", "sol2", "label"}; the labels of X.jsonl may '
    "stand in X-labels.lst"
)
_BRACKETS = re.compile(r"\[.*?\]")


@dataclass(frozen=True)
class Question:
    """A context and its possible endings, of which `label` (from 0) is right; `line` is its place."""

    context: str
    endings: tuple[str, ...]
    label: int
    line: int


@dataclass(frozen=True)
class Questions:
    """A file of questions: its name, the SHA-256 of the lines that were read (with their labels), the
    questions.
    """

    name: str
    sha256: str
    items: tuple[Question, ...]


def is_questions(path: Path) -> bool:
    """True for a file that holds questions and not text: its name ends in .jsonl."""
    return path.suffix.lower() == ".jsonl"


def read(path: Path, limit: int | None = None) -> Questions:
    """The first `limit` questions of a file, or all. Raises SpqtError naming the line that is wrong."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: no question is left", "give 1 or more")
    items: list[Question] = []
    digest = hashlib.sha256()
    number = 0
    try:
        labels = _labels_beside(path)
        with path.open("rb") as file:
            while (limit is None or len(items) < limit) and (line := file.readline(LINE_BYTES + 1)):
                label = labels[number] if number < len(labels) else None
                number += 1
                digest.update(line + (label or "").encode())
                if line.strip():
                    items.append(_question(line, number, path, label))
    except OSError as error:
        hint = "give a JSONL file" + files.near(path)
        raise SpqtError(f"{error.filename or path} can't be read: {error.strerror}", hint) from None
    if not items:
        raise SpqtError(f"{path} has no questions", SHAPES)
    return Questions(path.name, digest.hexdigest(), tuple(items))


def _labels_beside(path: Path) -> list[str]:
    """The lines of X-labels.lst next to X.jsonl, aligned with its lines; none where there is no such file."""
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.exists():
        return []
    return [line.strip() for line in files.read_bounded(beside).decode("utf-8", "replace").split("\n")]


def _question(line: bytes, number: int, path: Path, label: str | None) -> Question:
    try:
        entry = _object(line)
        if label is not None:
            entry.setdefault("label", label)
        context, endings, right = _parts(entry)
    except ValueError as error:
        raise SpqtError(f"{path}, line {number}: {error}", SHAPES) from None
    return Question(context, endings, right, number)


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > LINE_BYTES:
        raise ValueError(f"longer than {LINE_BYTES} bytes")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _parts(entry: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    if "endings" in entry:
        context = _clean(_hellaswag_context(entry))
        given = entry["endings"]
        if not isinstance(given, list) or not 2 <= len(given) <= MOST_ENDINGS:
            raise ValueError(f"endings is not a list of 2 to {MOST_ENDINGS} texts")
        endings = tuple(_clean(_text({"an ending": one}, "an ending")) for one in given)
    elif "goal" in entry:
        context = f"Question: {_text(entry, 'goal')}\nAnswer:"
        endings = (_text(entry, "sol1"), _text(entry, "sol2"))
    else:
        raise ValueError("neither endings nor goal in it")
    if not all(text.strip() for text in (context, *endings)):
        raise ValueError("nothing is left of a text without its [brackets]")
    return context, endings, _label(entry.get("label"), len(endings))


def _hellaswag_context(entry: dict[str, Any]) -> str:
    """lm-eval's wording where the file has the data set's own fields, else ctx as it is."""
    if "activity_label" not in entry or "ctx_a" not in entry or "ctx_b" not in entry:
        return _text(entry, "ctx")
    fields = [entry[name] for name in ("activity_label", "ctx_a", "ctx_b")]
    if not all(isinstance(field, str) for field in fields):
        raise ValueError("activity_label, ctx_a or ctx_b is not a text")
    activity, first, second = fields
    return f"{activity}: {first} {second.capitalize()}"


def _clean(text: str) -> str:
    """Without the marks that WikiHow's texts carry in HellaSwag: " [title]" ends a sentence, others go."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is missing or not a text")
    return value


def _label(value: Any, endings: int) -> int:
    """HellaSwag's labels are numbers in its own files and digits on the hub."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 4:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < endings:
        raise ValueError(f"label is not a number from 0 to {endings - 1}")
    return value
