"""Reading text: bad files, documents, dialogues, windows."""

import logging
from pathlib import Path

import numpy as np
import pytest

from spqt_cli.errors import SpqtError
from spqt_cli.measure import texts
from spqt_cli.system import sandbox


class Words:
    """A tokenizer of code points; `template` stands for the chat template."""

    bos_token_id = 1

    def __init__(self, bos: bool = False, template: bool = True, system: bool = True) -> None:
        self.bos, self.has_chat_template, self.system = bos, template, system

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * (self.bos and add_special_tokens) + [ord(letter) for letter in text]

    def apply_chat_template(self, turns, tokenize):
        from jinja2 import TemplateError

        assert not tokenize
        if turns[0]["role"] == "system" and not self.system:
            raise TemplateError("System role not supported")
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)


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
    with pytest.raises(SpqtError, match="has fewer than 128 tokens, 4 windows of 32 need 128") as caught:
        texts.need(rows, 4, text)
    assert caught.value.exit_code == 3
    for flag, says in (
        ("--windows", "at most --windows 3"),
        ("--tokens", "at most --tokens 96"),
        ("", "text"),
    ):
        with pytest.raises(SpqtError, match="has 101 tokens, 4 windows of 32 need 128") as caught:
            texts.need(rows, 4, text, 101, flag)
        assert caught.value.hint.endswith(says)
    with pytest.raises(SpqtError, match="1 window of 32 needs 32") as caught:
        texts.need(rows[:0], 1, text, 7, "--windows")
    assert "--windows" not in caught.value.hint
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


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", 5])
def test_fault_66_template_that_fails_in_its_own_way(template, checkpoint):
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = template
    with pytest.raises(SpqtError, match="chat template") as caught:
        texts.tokens(texts.read(None), tokenizer)
    assert "--data" in caught.value.hint


def test_fault_66_template_without_an_end(checkpoint, monkeypatch):
    """Ranges are bounded by transformers' sandbox, nested ones are not: it took memory until killed."""
    from mlx_lm.utils import load_tokenizer

    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{% for i in range(9999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    with pytest.raises(SpqtError, match="more than"):
        texts.tokens(texts.read(None), tokenizer)


def test_a_text_longer_than_the_context_is_no_warning(monkeypatch):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=3)
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Handler, "handle", lambda _, record: told.append(record))
    text = texts.Text("some", "", ("a b a b a",))
    assert texts.tokens(text, tokenizer) == [0, 1, 0, 1, 0]
    assert told == []
