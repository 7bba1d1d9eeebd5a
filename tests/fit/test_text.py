"""Text to fit on: kept whole beside the work folder, taken again only if all that it depends on is equal."""

import json
import os

import numpy as np
import pytest

from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from spqt_cli.fit import text
from spqt_cli.fit.text import TextOptions

SOURCE = {"name": "tiny", "revision": None, "headers": "ab"}


class Writer:
    """Stands for the model: other tokens at every call, so that text that was kept can be told."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, count, length, seed, on_progress):
        self.calls += 1
        on_progress(1, 1, "writing text")
        return np.random.default_rng([seed, self.calls]).integers(0, 512, (count, length)).astype(np.int32)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return session.load_tokenizer(checkpoint)


@pytest.fixture
def prepare(tmp_path, tokenizer):
    write = Writer()

    def run(source=SOURCE, **options):
        wishes = TextOptions(**{"own": 3, "length": 16, **options})
        return text.prepare(tmp_path / "kept", source, wishes, tokenizer, write, lambda *_: None)

    run.write, run.path = write, tmp_path / "kept" / text.NAME
    return run


def test_a_resumed_run_reads_what_was_kept(prepare):
    first, again = prepare(), prepare()
    assert prepare.write.calls == 1
    assert np.array_equal(first.windows, again.windows)
    assert first.sha256 == again.sha256 == text.sha256(first.windows)
    assert [path.name for path in prepare.path.parent.iterdir()] == [text.NAME]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"own": 4}, {"length": 17}, {"source": {**SOURCE, "headers": "cd"}}]
)
def test_another_identity_is_made_anew_and_nothing_is_called_damaged(prepare, change):
    prepare()
    found = prepare(**change)
    assert prepare.write.calls == 2
    assert found.notes == ()


def test_another_version_is_made_anew(prepare, monkeypatch):
    prepare()
    monkeypatch.setattr(text, "__version__", "0.0.0")
    prepare()
    assert prepare.write.calls == 2


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, "cut", "empty"])
def test_a_damaged_file_is_made_anew_and_said(prepare, place):
    first = prepare()
    data = bytearray(prepare.path.read_bytes())
    if isinstance(place, str):
        data = data[: len(data) // 2 if place == "cut" else 0]
    else:
        at = int(place * len(data))
        data[at : at + 8] = bytes(255 - byte for byte in data[at : at + 8])
    prepare.path.write_bytes(data)
    found = prepare()
    if prepare.write.calls == 1:  # bytes that mean nothing: padding of the container
        assert found.sha256 == first.sha256
        return
    assert "damaged" in found.notes[0]
    assert prepare().notes == ()  # whole again
    assert prepare.write.calls == 2


def test_tokens_that_are_not_those_of_the_hash_are_damage(prepare):
    prepare()
    with np.load(prepare.path) as stored:
        said, windows = str(stored["said"]), stored["windows"].copy()
    windows[1, 3] ^= 1
    with prepare.path.open("wb") as file:
        np.savez(file, windows=windows, said=np.array(said))
    assert "damaged" in prepare().notes[0]


def test_said_that_is_no_object_is_damage(prepare):
    prepare()
    for said in ("[]", "null", "{", json.dumps({"identity": 1})):
        with prepare.path.open("wb") as file:
            np.savez(file, windows=np.zeros((1, 2), np.int32), said=np.array(said))
        assert prepare().windows.shape == (3, 16)


def test_killed_before_the_rename_leaves_nothing_that_is_read(prepare, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert not prepare.path.exists()
    assert prepare().notes == ()
    assert prepare.write.calls == 2
    assert [path.name for path in prepare.path.parent.iterdir()] == [text.NAME]


def test_a_file_is_added_or_takes_the_place(prepare, tmp_path):
    data = tmp_path / "mine.txt"
    data.write_text("pack my box with five dozen liquor jugs " * 60)
    both = prepare(data=data, most=2)
    assert (both.own, len(both.windows)) == (3, 5)
    alone = prepare(own=0, data=data, most=2)
    assert prepare.write.calls == 1
    assert np.array_equal(alone.windows, both.windows[3:])
    data.write_text("the quick brown fox jumps over the lazy dog " * 60)
    assert not np.array_equal(prepare(own=0, data=data, most=2).windows, alone.windows)


def test_no_text_at_all(prepare, tmp_path):
    with pytest.raises(SpqtError, match="no text to fit on"):
        prepare(own=0)
    short = tmp_path / "short.txt"
    short.write_text("a word")
    with pytest.raises(SpqtError, match="too short"):
        prepare(own=0, data=short)


def test_the_hash_is_of_tokens_alone():
    rows = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert text.sha256(rows) == text.sha256(np.asfortranarray(rows).astype(np.int64))
    assert text.sha256(rows) != text.sha256(rows + 1)
