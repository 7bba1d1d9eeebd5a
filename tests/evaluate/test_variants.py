"""Sources to measure against: one whose tokens are others is refused before its weights are read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from spqt_cli.cli import worker
from spqt_cli.convert import convert, source_model
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from spqt_cli.evaluate import multiple_choice, perplexity, variants
from spqt_cli.evaluate.variants import EvaluateOptions
from tests.cli.test_commands import assert_error, spqt
from tests.conftest import VOCAB, random_weights, tiny_checkpoint, tiny_config
from tests.lib.writing_gguf import write_model


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


@pytest.fixture(scope="module")
def loaded(converted) -> session.Loaded:
    return session.load(converted, dense=True)


def with_swapped_tokens(folder: Path, count: int, arch: str = "llama") -> Path:
    """A checkpoint of the shared tokenizer in which `count` tokens, an even number, have changed places."""
    tiny_checkpoint(folder, arch)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocab = document["model"]["vocab"]
    names = sorted(vocab, key=vocab.__getitem__)[-count:]
    for one, other in zip(names[::2], names[1::2], strict=True):
        vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(document))
    return folder


def test_the_source_itself_passes(loaded, checkpoint):
    variants.check_source(str(checkpoint), loaded, ("vocab_size", "hidden_size"))


def test_another_architecture_with_the_same_tokens_passes(loaded, tmp_path):
    variants.check_source(str(tiny_checkpoint(tmp_path / "qwen2", "qwen2")), loaded)


def test_tokens_in_other_places_are_counted(loaded, tmp_path):
    found = len(loaded.tokenizer.get_vocab())
    with pytest.raises(SpqtError, match=f"another tokenizer.*: 100 of {found} tokens differ") as caught:
        variants.check_source(str(with_swapped_tokens(tmp_path / "other", 100)), loaded)
    assert caught.value.exit_code == 3
    assert str(loaded.folder) in caught.value.hint


def test_a_few_tokens_spelled_anew_pass(loaded, tmp_path):
    variants.check_source(str(with_swapped_tokens(tmp_path / "other", 2)), loaded)  # of 312: less than 1 %


def test_another_vocabulary_size_is_refused(loaded, tmp_path):
    other = tiny_checkpoint(tmp_path / "wide", vocab_size=VOCAB + 8)
    with pytest.raises(SpqtError, match=f"vocab_size of {VOCAB + 8}.* of {VOCAB}"):
        variants.check_source(str(other), loaded)


def test_the_tokens_of_a_gguf_file_are_looked_at(loaded, tmp_path):
    config = tiny_config("llama")
    weights = {name: np.array(weight) for name, weight in random_weights(config, 0).items()}
    path = write_model(tmp_path / "m.gguf", "llama", config, weights)  # with a tokenizer of its own
    with pytest.raises(SpqtError, match="another tokenizer"):
        variants.check_source(str(path), loaded)
    convert.convert(str(path), tmp_path / "own", convert.ConvertOptions(bits=4, group_size=32))
    variants.check_source(str(path), session.load(tmp_path / "own", dense=True))


def test_a_head_of_another_width_can_not_be_taken(converted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen liquor jugs " * 100)
    other = tiny_checkpoint(tmp_path / "wide", hidden_size=128)
    options = EvaluateOptions(windows=1, window=64, baseline=str(other), source_head=True)
    with pytest.raises(SpqtError, match="hidden_size of 128"):
        perplexity.evaluate(converted, text, options, lambda *_: None)


def test_eval_reads_no_weight_of_a_source_with_other_tokens(converted, tmp_path, monkeypatch):
    other = with_swapped_tokens(tmp_path / "other", 100)
    monkeypatch.setattr(source_model, "load", lambda *_: pytest.fail("its weights were read"))
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("pack my box with five dozen liquor jugs " * 100)
    questions.write_text(json.dumps({"goal": "pack", "sol1": "my box", "sol2": "jugs", "label": 0}) + "\n")
    result = spqt("eval", converted, text, "--windows", 1, "--baseline", other, "-q")
    assert_error(result, 3, "another tokenizer", "100 of", "hint")
    options = EvaluateOptions(baseline=str(other))
    with pytest.raises(SpqtError, match="another tokenizer"):
        multiple_choice.evaluate(converted, questions, options, lambda *_: None)
