"""Reading text: bad files, documents, dialogues, windows."""

from pathlib import Path

import numpy as np
import pytest

from spqt_cli import texts
from spqt_cli.errors import SpqtError


class Words:
    """A tokenizer of code points; `template` stands for the chat template."""

    bos_token_id = 1

    def __init__(self, bos: bool = False, template: bool = True, system: bool = True) -> None:
        self.bos, self.has_chat_template, self.system = bos, template, system

    def encode(self, text: str) -> list[int]:
        return [1] * self.bos + [ord(letter) for letter in text]

    def apply_chat_template(self, turns, tokenize, return_dict):
        from jinja2 import TemplateError

        if turns[0]["role"] == "system" and not self.system:
            raise TemplateError("System role not supported")
        return [ord(letter) for turn in turns for letter in f"[{turn['role']}]{turn['content']}"]


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    return path


def decoded(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@pytest.mark.parametrize(("data", "cause"), [(b"", "empty"), (b" \n\n", "empty"), (b"\xff\xfe", "not UTF-8")])
def test_fault_48_empty_or_not_utf8(tmp_path, data, cause):
    with pytest.raises(SpqtError, match=cause) as caught:
        texts.read(written(tmp_path, data))
    assert caught.value.exit_code == 3


def test_fault_48_missing(tmp_path):
    with pytest.raises(SpqtError, match="can't be read"):
        texts.read(tmp_path / "none.txt")
    with pytest.raises(SpqtError, match="can't be read"):
        texts.read(tmp_path)  # a folder


def test_fault_49_too_short_names_both_counts(tmp_path):
    text = texts.read(written(tmp_path, b"x" * 100))
    rows = texts.windows(texts.tokens(text, Words()), 32)
    with pytest.raises(SpqtError, match="128 tokens needed, 96 found") as caught:
        texts.need(rows, 4, text)
    assert caught.value.exit_code == 3
    texts.need(rows, 3, text)


def test_documents_and_dialogues(tmp_path):
    data = b"plain\n<|document|>\n<|system|>\nbe kind\n<|user|>\nhi\n<|assistant|>\nyo\n"
    text = texts.read(written(tmp_path, data))
    assert len(text.documents) == 2
    assert decoded(texts.tokens(text, Words())) == "plain[system]be kind[user]hi[assistant]yo"


def test_windows_line_ends_are_the_same_text(tmp_path):
    text = texts.read(written(tmp_path, b"\xef\xbb\xbfa\r\n<|document|>\r\n<|user|>\r\nhi\r\n"))
    assert decoded(texts.tokens(text, Words())) == "a[user]hi"


def test_template_without_system_role(tmp_path):
    text = texts.read(written(tmp_path, b"<|system|>\nbe kind\n<|user|>\nhi\n"))
    assert decoded(texts.tokens(text, Words(system=False))) == "[user]be kind\n\nhi"


def test_no_template_reads_as_plain_dialogue(tmp_path):
    text = texts.read(written(tmp_path, b"<|user|>\nhi\n<|assistant|>\nyo\n"))
    assert decoded(texts.tokens(text, Words(template=False))) == "User: hi\n\nAssistant: yo"


def test_marker_inside_a_line_is_text(tmp_path):
    text = texts.read(written(tmp_path, b"say <|document|> or <|user|> here\n"))
    assert decoded(texts.tokens(text, Words())) == "say <|document|> or <|user|> here"


def test_every_window_begins_with_the_opening():
    opening = texts.opening(Words(bos=True))
    assert opening == [1]
    rows = texts.windows([1, *range(10, 40)], 8, opening)
    assert rows.shape == (4, 8)
    assert (rows[:, 0] == 1).all()
    # No token is lost or doubled: 28 of the 30 fill whole windows of 7 and an opening.
    assert rows[:, 1:].ravel().tolist() == list(range(10, 38))


def test_tokenizer_without_opening():
    assert texts.opening(Words()) == []
    assert texts.windows(range(20), 8).tolist() == np.arange(16).reshape(2, 8).tolist()
