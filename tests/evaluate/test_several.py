"""`spqt eval` with several models, texts and peers: the figures of each alone, and paired differences."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.cli import worker
from spqt_cli.convert import convert, source_model
from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.errors import ResourceError, SpqtError, UsageError
from spqt_cli.evaluate import perplexity, several, variants
from spqt_cli.evaluate.several import Kept, Wishes
from spqt_cli.evaluate.several_report import Compared, Several, hold_against
from spqt_cli.evaluate.variants import EvaluateOptions
from tests.cli.test_commands import assert_error, spqt
from tests.evaluate.test_variants import with_swapped_tokens

ALONE = EvaluateOptions(windows=3, window=64, sparsity="0.4,0.7")


def quiet(done: float, total: float, what: str) -> None:
    assert 0 <= done <= total


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch):
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    words = ["pack", "the", "quick", "brown", "box", "over", "lazy", "dog", "with", "my", "fox", "jumps"]
    for seed, name in enumerate(("one.txt", "other.txt")):
        (folder / name).write_text(" ".join(np.random.default_rng(seed).choice(words, 1000)))
    return [folder / "one.txt", folder / "other.txt"]


@pytest.fixture(scope="module")
def stock(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as mlx-lm itself quantizes it, embedding included."""
    import mlx_lm

    output = tmp_path_factory.mktemp("stock") / "stock"
    mlx_lm.convert(str(checkpoint), str(output), quantize=True, q_bits=4, q_group_size=32)
    return output


@pytest.fixture(scope="module")
def coarse(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in 3 bits, without thresholds."""
    output = tmp_path_factory.mktemp("coarse") / "coarse"
    convert.convert(str(checkpoint), output, convert.ConvertOptions(bits=3, group_size=32))
    return output


@pytest.fixture(scope="module")
def wishes(calibrated, checkpoint, stock, texts) -> Wishes:
    options = dataclasses.replace(ALONE, baseline=str(checkpoint), rows=True)
    return Wishes([f"ours={calibrated}"], texts, options, (3, 2), [str(stock)])


@pytest.fixture(scope="module")
def found(wishes) -> Several:
    return several.evaluate(wishes, quiet)


def named(found: Several, name: str, text: int = 0) -> Compared:
    return next(row for row in found.texts[text].variants if row.name == name)


def test_each_text_has_all_variants(found):
    names = ["source", "row-grouped", "stock", "dense", "40%", "70%"]
    assert [[row.name for row in one.variants] for one in found.texts] == [names, names]
    assert [(one.text, one.windows, one.scored) for one in found.texts] == [
        ("one.txt", 3, 93),
        ("other.txt", 2, 62),
    ]
    assert set(named(found, "70%").against) == {"source", "dense"}
    assert set(named(found, "stock").against) == {"source"}


def test_figures_are_those_of_one_model_on_one_text(calibrated, checkpoint, texts, found):
    options = dataclasses.replace(ALONE, baseline=str(checkpoint), rows=True)
    alone = perplexity.evaluate(calibrated, texts[0], options, quiet)
    for row in alone.variants:
        same = named(found, row.name)
        assert same.perplexity == pytest.approx(row.perplexity, rel=1e-6)
        assert same.realised == pytest.approx(row.realised)
        for reference, one in row.against.items():
            # the source's log-probabilities are held in 16 bits here
            assert same.against[reference].kl == pytest.approx(one.kl, abs=1e-4)


def test_peer_is_what_mlx_lm_makes_of_the_folder(stock, texts, found):
    import mlx_lm

    from spqt_cli.measure import texts as reading

    network, tokenizer = mlx_lm.load(str(stock))
    tokens = reading.windows(reading.tokens(reading.read(texts[0]), tokenizer), 64)[:3]
    logits = network(mx.array(tokens))[:, 32:-1]
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    nll = -np.take_along_axis(np.array(log_p), tokens[:, 33:, None], axis=-1)
    assert named(found, "stock").perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_differences_are_paired_by_window(found):
    assert found.against == "row-grouped"
    rows, sparse = named(found, "row-grouped", 1), named(found, "70%", 1)
    gained = np.array(sparse.against["source"].windows) - rows.against["source"].windows
    assert sparse.less.mean == pytest.approx(gained.mean())
    assert sparse.less.se == pytest.approx(gained.std(ddof=1) / math.sqrt(2))
    assert rows.less is None


def test_bytes_are_those_that_generate_counts(checkpoint, tmp_path, calibrated, found):
    dense, sparse = named(found, "dense"), named(found, "40%")
    loaded = session.load(calibrated)
    tokens = generate.encode(loaded, Prompt("the quick brown fox"))
    *_, statistics = generate.stream(loaded, tokens, Sampling(), Options(max_tokens=8))
    ratio = statistics.weight_bytes_per_token / statistics.dense_weight_bytes_per_token
    # another text skips another share; numbers are stored in 32 bits here
    assert sparse.bytes_per_token / dense.bytes_per_token == pytest.approx(ratio, abs=0.12)
    total, zigzag = several.step_bytes(loaded.model, loaded.config)
    assert dense.bytes_per_token == total
    unread = sum(size * sparse.layers[path] for path, size in zigzag.items())
    assert sparse.bytes_per_token == pytest.approx(total - unread)
    # row-grouped layers of the same bits and groups hold as much, but for what pads our bands
    assert named(found, "row-grouped").bytes_per_token <= total < named(found, "source").bytes_per_token


def test_several_models_are_labelled_and_held_against_any(calibrated, coarse, checkpoint, texts):
    options = EvaluateOptions(window=64, baseline=str(checkpoint))
    wishes = Wishes([str(calibrated), f"three={coarse}"], texts[:1], options, (3,), against="three dense")
    found = several.evaluate(wishes, quiet)
    own = calibrated.name
    names = ["source", f"{own} dense", f"{own} 40%", "three dense"]
    assert [row.name for row in found.texts[0].variants] == names
    assert found.models == {own: str(calibrated), "three": str(coarse)}
    better = named(found, f"{own} dense")
    assert better.less.name == "three dense"
    assert better.less.mean < 0
    assert f"{better.less.mean:+.4f}" in found.table()
    refused = dataclasses.replace(wishes, against="four")
    with pytest.raises(UsageError, match="no variant 'four'") as caught:
        several.evaluate(refused, quiet)
    assert "three dense" in caught.value.hint


def test_without_a_source_the_difference_is_of_surprise(calibrated, texts):
    found = several.evaluate(Wishes([str(calibrated)], texts, EvaluateOptions(window=64), (2,)), quiet)
    dense, sparse = found.texts[0].variants
    gained = math.log(sparse.perplexity / dense.perplexity)
    assert found.against == "dense"
    assert sparse.less.mean == pytest.approx(gained, abs=1e-5)
    assert "KL dense" in found.table()


def test_heads_of_the_source_in_all(wishes, found):
    options = dataclasses.replace(wishes.options, source_head=True)
    heads = several.evaluate(dataclasses.replace(wishes, options=options), quiet)
    for name in ("row-grouped", "stock", "dense"):
        assert named(heads, name).against["source"].kl < named(found, name).against["source"].kl
        assert named(heads, name).bytes_per_token == named(found, name).bytes_per_token
    assert "source's in all" in heads.table()


def test_one_model_is_in_memory_at_a_time(wishes, coarse, monkeypatch):
    alive: list[str] = []

    def watched(load):
        def loading(*args, **named):
            import gc
            import weakref

            gc.collect()
            assert alive == []
            network = load(*args, **named)
            alive.append("one")
            weakref.finalize(getattr(network, "model", network), alive.clear)
            return network

        return loading

    monkeypatch.setattr(source_model, "load", watched(source_model.load))
    monkeypatch.setattr(variants, "load_peer", watched(variants.load_peer))
    monkeypatch.setattr(session, "load", watched(session.load))
    models = [*wishes.models, f"three={coarse}"]
    options = dataclasses.replace(wishes.options, sparsity=None)
    several.evaluate(
        dataclasses.replace(wishes, models=models, texts=wishes.texts[:1], counts=(1,), options=options),
        quiet,
    )


def test_kept_predictions_come_back_normalized(tmp_path):
    logits = np.random.default_rng(0).normal(0, 6, (3, 5, 300)).astype(np.float32)
    logits[..., :7] = -np.inf  # what a model forbids
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    kept = Kept(tmp_path, [(1, 5), (3, 5)])
    kept.write(1, 0, log_p[:1])
    kept.write(1, 1, log_p[1:])
    assert not list(tmp_path.iterdir())  # nothing that a killed process would leave
    found = kept.read(1, 1, 2)
    kept.close()
    assert np.exp(found).sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert np.isneginf(found[..., :7]).all()
    assert np.abs(found[..., 7:] - log_p[1:, :, 7:]).max() < 0.02


def test_a_disk_too_small_is_told_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ResourceError, match="GB") as caught:
        Kept(tmp_path, [(3, 5)]).write(0, 0, np.zeros((1, 5, 300), np.float32))
    assert "TMPDIR" in caught.value.hint


BAD = {
    "two models are called 'm'": {"models": ["m=a", "m=b"]},
    "names no model": {"models": ["m="]},
    "3 numbers of windows for 2 texts": {"counts": (1, 2, 3)},
    "0 windows": {"counts": (2, 0)},
    "is another variant's name": {"peers": ["source=x"]},
    "'stock' is another variant's name": {"models": ["stock=x"]},
}


@pytest.mark.parametrize("says", BAD)
def test_bad_wishes(wishes, says):
    with pytest.raises(UsageError, match=says):
        several.evaluate(dataclasses.replace(wishes, **BAD[says]), quiet)


def test_other_tokens_are_refused_before_weights_are_read(wishes, tmp_path, monkeypatch):
    other = with_swapped_tokens(tmp_path / "other", 100)
    convert.convert(str(other), tmp_path / "swapped", convert.ConvertOptions(bits=4, group_size=32))
    monkeypatch.setattr(source_model, "load", lambda *_: pytest.fail("its weights were read"))
    plain = dataclasses.replace(wishes.options, sparsity=None)
    for change in ({"peers": [str(other)]}, {"models": [*wishes.models, str(tmp_path / "swapped")]}):
        with pytest.raises(SpqtError, match="another tokenizer"):
            several.evaluate(dataclasses.replace(wishes, options=plain, **change), quiet)


def test_a_converted_folder_is_no_peer(wishes, calibrated):
    with pytest.raises(SpqtError):
        several.evaluate(dataclasses.replace(wishes, peers=[str(calibrated)]), quiet)


def test_first_dense_one_without_row_grouped(found):
    results = [
        dataclasses.replace(
            one, variants=[row for row in one.variants if row.name in ("source", "dense", "70%")]
        )
        for one in found.texts
    ]
    assert hold_against(results, None) == "dense"


def test_tables_fit_a_terminal(found):
    lines = found.table().splitlines()
    assert [at for at, line in enumerate(lines) if "positions scored" in line] == [0, 9]
    assert max(map(len, lines)) <= 80
    assert lines[4].split()[0] == "stock"


def test_the_command_takes_windows_for_each_text(calibrated, texts):
    shown = spqt("eval", *texts, "--model", f"ours={calibrated}", "--windows", "1,2", "--json")
    assert shown.returncode == 0, shown.stderr.decode()
    found = json.loads(shown.stdout)
    assert found["models"] == {"ours": str(calibrated)}
    assert [one["windows"] for one in found["texts"]] == [1, 2]
    less = [one["variants"][1]["less"] for one in found["texts"]]
    assert less[0]["name"] == found["against"] == "dense"
    assert less[0]["se"] is None  # one window
    assert less[1]["se"] > 0


def test_wrong_windows_and_questions_of_several(calibrated, texts):
    assert_error(spqt("eval", calibrated, texts[0], "--windows", "8,x"), 2, "--windows")
    assert_error(spqt("eval", calibrated, texts[0], "q.jsonl"), 2, "questions")
    assert_error(spqt("eval", calibrated, "q.jsonl", "--against", "dense"), 2, "questions")


def test_the_shipped_text_alone_is_one_text(calibrated):
    alone = spqt("eval", calibrated, "--shipped", "--windows", 1, "--json")
    assert json.loads(alone.stdout)["text"] == "the shipped text"
