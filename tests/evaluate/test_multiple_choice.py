"""Multiple choice on tiny models whose answers are known, and against one-token decode steps."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.convert import convert
from spqt_cli.decode import layers, phase, session
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.evaluate import multiple_choice, questions
from spqt_cli.evaluate.variants import EvaluateOptions
from spqt_cli.measure import probes
from tests.cli.test_commands import assert_error, process
from tests.conftest import random_weights, tiny_config, write_tokenizer

LONG, SHORT = "fox fox fox fox", "fox"


def quiet(done: float, total: float, what: str) -> None:
    assert 0 <= done <= total


def ask(folder: Path, *entries: dict) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    """A converted model that repeats the last token: blocks add nothing, the head is the embedding.

    A token follows itself with a probability of about 0.8: its logit is about 8, others' have a
    spread of 1.
    """
    source = tmp_path_factory.mktemp("parrot") / "source"
    source.mkdir()
    config = tiny_config("qwen2")
    weights = random_weights(config, seed=0)
    for name in weights:
        if "norm" in name:
            weights[name] = mx.ones_like(weights[name])
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (source / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "pt"})
    write_tokenizer(source)
    output = source.parent / "parrot"
    convert.convert(str(source), output, convert.ConvertOptions(bits=8, group_size=32))
    return output


def test_known_answers(parrot, tmp_path):
    entries = (
        {"ctx": "the lazy fox", "endings": ["dog", LONG, SHORT], "label": 2},  # less likely, the longer
        {"ctx": "the lazy fox", "endings": ["dog", LONG, SHORT], "label": 1},  # but more so per character
        {"ctx": "the lazy fox", "endings": ["dog", LONG, SHORT], "label": 0},
        {"ctx": "quick", "endings": ["box", "quick"], "label": "1"},
    )
    result = multiple_choice.evaluate(parrot, ask(tmp_path, *entries), EvaluateOptions(), quiet)
    (dense,) = result.variants
    assert dense.name == "dense"
    assert dense.correct == [True, False, False, True]
    assert dense.correct_norm == [False, True, False, True]
    assert dense.acc == dense.acc_norm == 0.5
    # the sample standard deviation of 1, 0, 0, 1 is sqrt(1/3)
    assert dense.acc_se == pytest.approx(math.sqrt(1 / 3) / 2)


def stepwise(loaded: session.Loaded, context: list[int], ending: list[int]) -> float:
    """The oracle: a dense prompt, then one token at a time, as generate decodes."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(loaded.model)
    logits, total = loaded.model(mx.array([context]), cache=cache)[0, -1], 0.0
    for token in ending:
        total += (logits[token] - mx.logsumexp(logits)).item()
        with phase.decoding():
            logits = loaded.model(mx.array([[token]]), cache=cache)[0, -1]
    return total


@pytest.mark.parametrize("context", ["the quick brown fox jumps over", "the", "x"])
def test_scores_are_those_of_decoding(calibrated, context):
    question = questions.Question(context, ("the lazy dog", "my box", "a", "five dozen liquor jugs"), 0, 1)
    sparse, loaded = session.load(calibrated), session.load(calibrated)
    encoded = multiple_choice.encode(question, loaded.tokenizer, None, Path("questions.jsonl"))
    assert len({len(ending) for ending in encoded.endings}) > 1  # so rows are padded
    values = {path: layer.threshold.item() for path, layer in layers.zigzag_layers(loaded.model).items()}
    with probes.probing(loaded.model) as harness:
        cache = multiple_choice.after_context(loaded.model, encoded)
        masking = probes.Masking(values)
        scores = multiple_choice.ending_scores(loaded.model, cache, encoded, harness, masking)
        dense = multiple_choice.ending_scores(loaded.model, cache, encoded, harness)
    expected = [stepwise(sparse, encoded.context, ending) for ending in encoded.endings]
    # float32 in another order of summation, over up to 20 tokens; skipping moves scores by far more
    assert scores == pytest.approx(expected, rel=1e-4)
    assert np.abs(dense - expected).max() > 0.02


def test_batches_are_one_by_one(calibrated, monkeypatch):
    question = questions.Question(
        "the quick brown", ("fox jumps over", "dog", "box", "lazy liquor jugs"), 0, 1
    )
    loaded = session.load(calibrated)
    encoded = multiple_choice.encode(question, loaded.tokenizer, None, Path("questions.jsonl"))
    values = {path: layer.threshold.item() for path, layer in layers.zigzag_layers(loaded.model).items()}
    found, shares = [], []
    with probes.probing(loaded.model) as harness:
        cache = multiple_choice.after_context(loaded.model, encoded)
        for rows in (1, 512):  # an ending a pass; all in one, padded to the longest
            monkeypatch.setattr(multiple_choice, "ROWS_AT_ONCE", rows)
            masking = probes.Masking(values)
            found.append(multiple_choice.ending_scores(loaded.model, cache, encoded, harness, masking))
            shares.append(probes.weighted(masking.realised(), harness.layers))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)  # padding is not counted
    assert 0.2 < shares[0] < 0.6


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_other_caches_are_repeated(arch, tmp_path):
    from tests.conftest import tiny_checkpoint

    source = tiny_checkpoint(tmp_path / "source", arch, sliding_window=8)
    convert.convert(str(source), tmp_path / "out", convert.ConvertOptions(bits=8, group_size=32))
    loaded = session.load(tmp_path / "out", dense=True)
    context = "the quick brown fox jumps over the lazy dog and the fox"  # more than the window
    question = questions.Question(context, ("jumps over", "dog", "my box with five"), 0, 1)
    encoded = multiple_choice.encode(question, loaded.tokenizer, None, Path("questions.jsonl"))
    assert len(encoded.context) > 12
    with probes.probing(loaded.model) as harness:
        cache = multiple_choice.after_context(loaded.model, encoded)
        scores = multiple_choice.ending_scores(loaded.model, cache, encoded, harness)
    for ending, score in zip(encoded.endings, scores, strict=True):
        logits = loaded.model(mx.array([[*encoded.context, *ending]]))[0]
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        first = len(encoded.context) - 1
        expected = sum(log_p[first + i, token].item() for i, token in enumerate(ending))
        assert score == pytest.approx(expected, rel=1e-4)


def test_variants_and_paired_differences(calibrated, checkpoint, tmp_path):
    words = ["fox", "dog", "box", "jugs", "quick", "lazy"]
    draw = np.random.default_rng(3)
    entries = [
        {
            "ctx": f"the {draw.choice(words)}",
            "endings": [f"{word} jumps over" for word in draw.permutation(words)[:3]],
            "label": i % 3,
        }
        for i in range(8)
    ]
    options = EvaluateOptions(sparsity="0.4,0.9", baseline=str(checkpoint), rows=True, limit=6)
    result = multiple_choice.evaluate(calibrated, ask(tmp_path, *entries), options, quiet)
    assert result.questions == 6
    assert [row.name for row in result.variants] == ["source", "row-grouped", "dense", "40%", "90%"]
    dense, last = result.variants[2], result.variants[-1]
    assert set(last.against) == {"source", "dense"}
    assert set(dense.against) == {"source"}
    gained = np.array(last.correct, float) - np.array(dense.correct, float)
    assert last.against["dense"].acc == gained.mean()
    assert last.against["dense"].acc_se == pytest.approx(gained.std(ddof=1) / math.sqrt(6))
    assert last.realised == pytest.approx(0.9, abs=0.1)
    assert len(result.table().splitlines()) == 8
    json.dumps(asdict(result))


def test_several_models_answer_beside_one_source(calibrated, converted, checkpoint, tmp_path):
    entries = [{"ctx": "the", "endings": ["fox", "dog jumps"], "label": at % 2} for at in range(4)]
    file, options = ask(tmp_path, *entries), EvaluateOptions(baseline=str(checkpoint), rows=True)
    result = multiple_choice.evaluate_several(
        {"a": str(calibrated), "b": str(converted)}, file, options, quiet
    )
    names = ["source", "row-grouped", "a dense", "a 40%", "b dense"]
    assert [row.name for row in result.variants] == names
    alone = multiple_choice.evaluate(converted, file, options, quiet).variants[-1]
    assert alone.against["source"] == result.variants[-1].against["source"]
    assert alone.correct == result.variants[-1].correct


def test_question_beyond_the_context(calibrated, tmp_path):
    file = ask(tmp_path, {"ctx": "fox " * 600, "endings": ["a", "b"], "label": 0})
    with pytest.raises(SpqtError, match=r"line 1: 60\d tokens, the model's context is 512"):
        multiple_choice.evaluate(calibrated, file, EvaluateOptions(), quiet)


def test_rows_need_a_source(calibrated, tmp_path):
    file = ask(tmp_path, {"ctx": "x", "endings": ["a", "b"], "label": 0})
    with pytest.raises(UsageError, match="source"):
        multiple_choice.evaluate(calibrated, file, EvaluateOptions(rows=True), quiet)


def test_command_tells_questions_from_text(calibrated, tmp_path):
    file = ask(tmp_path, {"goal": "x", "sol1": "fox", "sol2": "dog", "label": 0})
    result = process("eval", file, "--model", calibrated, "--json")
    assert result.returncode == 0, result.stderr.decode()
    assert [row["name"] for row in json.loads(result.stdout)["variants"]] == ["dense", "40%"]
    file.write_text('{"text": "x"}\n')
    assert_error(process("eval", file, "--model", calibrated), 3, "line 1")
    text = tmp_path / "text.txt"
    text.write_text("fox")
    assert_error(process("eval", text, "--model", calibrated, "--limit", "3"), 2, "--windows")
