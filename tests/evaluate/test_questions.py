"""Questions from JSONL files: both shapes, lm-eval's wording, and lines that are wrong."""

import json
from pathlib import Path

import pytest

from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.evaluate import questions

PLAIN = {"ctx": "A man sits.", "endings": ["He stands.", "He flies."], "label": 1}
PIQA = {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Eat it.", "label": 0}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_both_shapes(tmp_path):
    first, second = questions.read(write(tmp_path, PLAIN, "", PIQA)).items
    assert first == questions.Question("A man sits.", ("He stands.", "He flies."), 1, 1)
    assert second.context == "Question: Open a jar\nAnswer:"
    assert (second.endings, second.label, second.line) == (("Turn the lid.", "Eat it."), 0, 3)


def test_hellaswag_is_worded_as_lm_eval_does(tmp_path):
    entry = {
        "ind": 4, "activity_label": "Baking", "ctx": "not this one", "label": "0",
        "ctx_a": "[header] How to bake [title] Mix.", "ctx_b": "the baker",
        "endings": ["[substeps] stirs  it [title] Rest.", "runs."],
    }  # fmt: skip
    (question,) = questions.read(write(tmp_path, entry)).items
    assert question.context == "Baking: How to bake. Mix. The baker"
    assert question.endings == (" stirs it. Rest.", "runs.")
    assert question.label == 0


def test_labels_in_a_file_of_their_own(tmp_path):
    bare = {name: value for name, value in PIQA.items() if name != "label"}
    path = write(tmp_path, bare, {**bare, "label": 0}, bare)
    labels = tmp_path / "questions-labels.lst"
    labels.write_text("1\n1\n0\n")
    found = questions.read(path)
    assert [item.label for item in found.items] == [1, 0, 0]  # a label in the line itself counts
    labels.write_text("1\n1\n1\n")
    other = questions.read(path)
    assert other.items[2].label == 1
    assert other.sha256 != found.sha256  # other answers are another file of questions
    labels.write_text("1\n")
    with pytest.raises(SpqtError, match=r"line 3: label is not a number"):
        questions.read(path)


def test_labels_beside_that_are_no_labels(tmp_path):
    path = write(tmp_path, {name: value for name, value in PIQA.items() if name != "label"})
    (tmp_path / "questions-labels.lst").write_bytes(b"\xff\n")
    with pytest.raises(SpqtError, match="label is not a number"):
        questions.read(path)
    (tmp_path / "questions-labels.lst").unlink()
    (tmp_path / "questions-labels.lst").mkdir()
    with pytest.raises(SpqtError, match="can't be read"):
        questions.read(path)


def test_limit_stops_before_a_bad_line(tmp_path):
    path = write(tmp_path, PLAIN, PIQA, "not JSON")
    assert len(questions.read(path, 2).items) == 2
    with pytest.raises(SpqtError, match="line 3: not JSON"):
        questions.read(path)
    with pytest.raises(UsageError, match="--limit 0"):
        questions.read(path, 0)


BAD = {
    "not JSON": '{"ctx": ',
    "not a JSON object": "[1]",
    "neither endings nor goal": {"text": "x"},
    "ctx is missing": {**PLAIN, "ctx": 3},
    "endings is not a list": {**PLAIN, "endings": "He stands."},
    "of 2 to 64 texts": {**PLAIN, "endings": ["one"]},
    "an ending is missing or not a text": {**PLAIN, "endings": ["one", None]},
    "nothing is left": {**PLAIN, "endings": ["one", "[title]"]},
    "label is not a number from 0 to 1": {**PLAIN, "label": 2},
    "sol2 is missing": {**PIQA, "sol2": ""},
    "ctx_b is not a text": {**PLAIN, "activity_label": "x", "ctx_a": "y", "ctx_b": None},
    "not UTF-8": None,
    "longer than": '{"ctx": "' + "x" * questions.LINE_BYTES + '"}',
}


@pytest.mark.parametrize("cause", BAD)
def test_bad_lines_are_named(tmp_path, cause):
    path = write(tmp_path, PLAIN, BAD[cause] or "")
    if BAD[cause] is None:
        path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(SpqtError, match=rf"questions.jsonl, line \d: .*{cause}"):
        questions.read(path)


@pytest.mark.parametrize("label", [True, -1, 0.0, "x", "²", None, "-1", [0], 10**30])
def test_bad_labels(tmp_path, label):
    with pytest.raises(SpqtError, match="label"):
        questions.read(write(tmp_path, {**PLAIN, "label": label}))


def test_deep_nesting_is_no_crash(tmp_path):
    with pytest.raises(SpqtError, match="line 1"):
        questions.read(write(tmp_path, "[" * 100_000))


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(SpqtError, match="has no questions"):
        questions.read(write(tmp_path, ""))
    with pytest.raises(SpqtError, match="can't be read"):
        questions.read(tmp_path / "none.jsonl")
