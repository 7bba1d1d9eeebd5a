"""`spqt eval` on tiny models: masked rows are decode steps, and the report says what was measured."""

import dataclasses
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.decode import phase, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.evaluate import perplexity
from spqt_cli.evaluate.report import Variant
from spqt_cli.evaluate.variants import EvaluateOptions, parse_sparsities
from spqt_cli.measure import probes


def quiet(done: float, total: float, what: str) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["pack", "the", "quick", "brown", "box", "over", "lazy", "dog", "with", "my", "fox", "jumps"]
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 2000)))
    return path


@pytest.fixture(scope="module")
def quality(calibrated, checkpoint, text):
    options = EvaluateOptions(windows=3, window=64, sparsity="0,0.4,0.7", baseline=str(checkpoint), rows=True)
    return perplexity.evaluate(calibrated, text, options, quiet)


def named(quality, name: str) -> Variant:
    return next(row for row in quality.variants if row.name == name)


def test_masked_rows_are_one_token_steps(calibrated):
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array(np.random.default_rng(1).integers(5, 500, (1, 24)))
    loaded = session.load(calibrated)
    cache = make_prompt_cache(loaded.model)
    loaded.model(tokens[:, :12], cache=cache)  # a dense prompt
    with phase.decoding():
        steps = [loaded.model(tokens[:, i : i + 1], cache=cache) for i in range(12, 24)]
    layers = zigzag_layers(loaded.model)
    masking = probes.Masking({path: layer.threshold.item() for path, layer in layers.items()})
    with probes.probing(loaded.model) as harness:
        cache = probes.prompt_cache(loaded.model, tokens[:, :12])
        dense = probes.continuation(loaded.model, tokens[:, 12:], cache)
        with harness.masked(masking):
            masked = probes.continuation(loaded.model, tokens[:, 12:], cache)
    one_by_one = mx.concatenate(steps, axis=1)
    # float32 in another order of summation; skipping itself moves logits a thousand times as much
    assert mx.allclose(masked, one_by_one, rtol=1e-3, atol=1e-4)
    assert mx.abs(dense - one_by_one).max() > 0.05
    assert probes.weighted(masking.realised(), layers) == pytest.approx(0.4, abs=0.1)


def test_perplexity_against_a_plain_pass(calibrated, text, quality):
    from spqt_cli.measure import texts

    loaded = session.load(calibrated, dense=True)
    tokens = texts.windows(texts.tokens(texts.read(text), loaded.tokenizer), 64)[:3]
    logits = loaded.model(mx.array(tokens))[:, 32:-1]
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    nll = -np.take_along_axis(np.array(log_p), tokens[:, 33:, None], axis=-1)
    assert quality.scored == nll.size == 3 * 31
    assert named(quality, "dense").perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_variants_and_what_they_are_held_against(quality):
    assert [row.name for row in quality.variants] == ["source", "row-grouped", "dense", "40%", "70%"]
    assert set(named(quality, "70%").against) == {"source", "dense"}
    assert set(named(quality, "row-grouped").against) == {"source"}
    low, high = named(quality, "40%"), named(quality, "70%")
    assert 0 < low.against["dense"].kl < high.against["dense"].kl
    assert low.realised == pytest.approx(0.4, abs=0.1)
    assert high.realised == pytest.approx(0.7, abs=0.1)
    assert all(0 < share < 1 for share in low.layers.values())


def test_row_grouped_is_what_mlx_makes_of_the_source(checkpoint, text, quality):
    import mlx_lm
    from mlx import nn

    from spqt_cli.measure import texts

    stock, tokenizer = mlx_lm.load(str(checkpoint))

    def bits(path: str, module: nn.Module) -> dict[str, int] | bool:  # embedding and head: 5, as converted
        width = 5 if path.endswith("embed_tokens") else 4
        return {"group_size": 32, "bits": width} if hasattr(module, "to_quantized") else False

    nn.quantize(stock, class_predicate=bits)
    tokens = texts.windows(texts.tokens(texts.read(text), tokenizer), 64)[:3]
    logits = stock(mx.array(tokens))[:, 32:-1]
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    nll = -np.take_along_axis(np.array(log_p), tokens[:, 33:, None], axis=-1)
    assert named(quality, "row-grouped").perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_source_head_leaves_only_the_blocks_different(calibrated, checkpoint, text, quality):
    options = EvaluateOptions(windows=3, window=64, baseline=str(checkpoint), source_head=True)
    heads = perplexity.evaluate(calibrated, text, options, quiet)
    assert named(heads, "source").perplexity == named(quality, "source").perplexity
    assert named(heads, "dense").against["source"].kl < named(quality, "dense").against["source"].kl


def test_default_is_the_calibrated_share(calibrated, text):
    options = EvaluateOptions(windows=1, window=64)
    quality = perplexity.evaluate(calibrated, text, options, quiet)
    assert [row.name for row in quality.variants] == ["dense", "40%"]
    assert "40%" in quality.table()


def test_report_and_json(quality):
    from dataclasses import asdict

    lines = quality.table().splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["source", "row-grouped", "dense", "40%", "70%"]
    assert json.loads(json.dumps(asdict(quality)))["variants"][3]["against"]["dense"]["windows"]


def test_sweep_has_a_picture(quality):
    assert "#" not in quality.table()
    rows = quality.variants[-2:]
    longer = dataclasses.replace(quality, variants=[*quality.variants[:-2], rows[0], rows[0], rows[1]])
    bars = [line.count("#") for line in longer.table().splitlines()[-3:]]
    assert 0 < bars[0] == bars[1] < bars[2] == 40


def test_not_calibrated(converted, text):
    quality = perplexity.evaluate(converted, text, EvaluateOptions(windows=1, window=64), quiet)
    assert [row.name for row in quality.variants] == ["dense"]
    with pytest.raises(SpqtError, match="no thresholds"):
        perplexity.evaluate(converted, text, EvaluateOptions(windows=1, window=64, sparsity="0.4"), quiet)


def test_text_too_short(calibrated, text):
    with pytest.raises(SpqtError, match=r"has \d+ tokens, 10000 windows of 64 need 640000"):
        perplexity.evaluate(calibrated, text, EvaluateOptions(windows=10000, window=64), quiet)


def test_rows_need_a_source(calibrated, text):
    with pytest.raises(UsageError, match="source"):
        perplexity.evaluate(calibrated, text, EvaluateOptions(rows=True), quiet)


def test_sweeps():
    assert parse_sparsities("0.1:0.7:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert parse_sparsities("0.25, 0.4,0.25") == [0.25, 0.4]
    assert parse_sparsities("0:0.2:0.1") == [0.1, 0.2]  # dense is always measured


BAD = ["", "much", "0.1:0.7", "0.7:0.1:0.1", "0.1:0.7:0", "1.5", "nan", "-0.1", "0:0.9:nan"]


@pytest.mark.parametrize("asked", BAD)
def test_bad_sweeps(asked):
    with pytest.raises(UsageError):
        parse_sparsities(asked)
