"""Text for calibration and evaluation: reading it, the chat template, tokens, windows.

A text file is one document, or several separated by lines `<|document|>`. In a document, lines
`<|system|>`, `<|user|>` and `<|assistant|>` begin a dialogue's turns. It knows nothing of models.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.decode import text_borders
from spqt_cli.errors import SpqtError
from spqt_cli.system import files, sandbox

SHIPPED = "the shipped text"
_DOCUMENT = re.compile(r"^<\|document\|>[ \t]*\n", re.MULTILINE)
_TURN = re.compile(r"^<\|(system|user|assistant)\|>[ \t]*\n", re.MULTILINE)
# A text is longer than any context, and is cut into windows: the tokenizer's warning would only frighten.
logging.getLogger("transformers.tokenization_utils_base").addFilter(
    lambda record: "sequence length is longer than" not in record.getMessage()
)


@dataclass(frozen=True)
class Text:
    """A text that was read: its name in messages, the SHA-256 of its bytes, its documents."""

    name: str
    sha256: str
    documents: tuple[str, ...]


def read(path: Path | None) -> Text:
    """The text of a UTF-8 file, or the one that ships with spqt. Raises SpqtError on anything else."""
    if path is None:
        name = SHIPPED
        data = (resources.files("spqt_cli.configs") / "calibration.txt").read_bytes()
    else:
        name = str(path)
        try:
            data = files.read_bounded(path)
        except OSError as error:
            hint = "give a UTF-8 text file" + files.near(path)
            raise SpqtError(f"{path} can't be read: {error.strerror}", hint) from None
    try:
        content = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SpqtError(f"{path} is not UTF-8 (byte {error.start})", "convert it to UTF-8 first") from None
    documents = tuple(part for part in _DOCUMENT.split(content + "\n") if part.strip())
    if not documents:
        raise SpqtError(f"{path} is empty", "give a text file with words in it")
    return Text(name, hashlib.sha256(data).hexdigest(), documents)


def tokens(text: Text, tokenizer: Any) -> list[int]:
    """All documents one after another, each as the tokenizer would begin a prompt with it.

    Dialogues go through the tokenizer's chat template; without one they read "User: ...".
    """
    stream: list[int] = []
    for document in text.documents:
        turns = _turns(document)
        plain = document.strip("\n")
        stream += _dialogue(turns, tokenizer) if turns else text_borders.encode(tokenizer, plain)
    return stream


def _turns(document: str) -> list[dict[str, str]]:
    _, *parts = _TURN.split(document)
    return [
        {"role": role, "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _dialogue(turns: list[dict[str, str]], tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "has_chat_template", False):
        plain = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
        return text_borders.encode(tokenizer, plain)
    try:
        with sandbox.bounded("the model's chat template"):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is the model's code: it may raise anything
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise SpqtError(
                f"the model's chat template refuses a dialogue: {error}",
                "calibrate with --data and plain text",
            ) from None
    else:
        return list(tokenizer.encode(text, add_special_tokens=False))
    # Some templates know no system turn: it then opens the first user turn.
    first = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return _dialogue([first, *turns[2:]], tokenizer)


def windows(stream: Sequence[int], window: int, first: Sequence[int] = ()) -> np.ndarray:
    """All whole windows of a token stream, one after another: (count, window), int32.

    first: tokens that begin every window (see `opening`), put there where the stream has them not.
    """
    prefix, rows, at = list(first), [], 0
    while at < len(stream):
        begin = [] if list(stream[at : at + len(prefix)]) == prefix else prefix
        taken = window - len(begin)
        rows.append(begin + list(stream[at : at + taken]))
        at += taken
    return np.array([row for row in rows if len(row) == window], np.int32).reshape(-1, window)


def need(rows: np.ndarray, count: int, text: Text, tokens: int | None = None, flag: str = "") -> None:
    """Refuse a text of fewer than `count` windows, with what it has and what is needed.

    rows: (found, window), all of its whole windows. tokens: of the text, where the caller knows. flag: that
    asks for less: --windows, or --tokens.
    """
    found, window = rows.shape
    if found >= count:
        return
    has = f"fewer than {(found + 1) * window}" if tokens is None else f"{tokens}"
    windows = f"{count} windows of {window} need" if count > 1 else f"1 window of {window} needs"
    fewer = {"--windows": found, "--tokens": found * window if found > 1 else 0}.get(flag, 0)
    raise SpqtError(
        f"{text.name} is too short: it has {has} tokens, {windows} {count * window}",
        f"give a longer text, or at most {flag} {fewer}" if fewer else "give a longer text",
    )


def opening(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before any text: its BOS, or none."""
    encoded = list(tokenizer.encode(""))
    bos = getattr(tokenizer, "bos_token_id", None)
    return encoded[:1] if encoded and encoded[0] == bos else []
