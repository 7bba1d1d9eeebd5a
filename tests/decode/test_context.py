"""A model that is right only up to a length is never run beyond it, whoever asks; what ends there says so."""

import json
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import perplexity, server
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from spqt_cli.bench import bench
from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import context, session
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.evaluate import lm_eval
from spqt_cli.evaluate import perplexity as evaluating
from spqt_cli.format import config_json
from tests.conftest import SIZES, random_weights, tiny_config, write_tokenizer

LIMIT = 300
ROPE = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "rope_theta": 1e4,
        "original_max_position_embeddings": LIMIT}  # fmt: skip
PROMPT = [7 + i % 90 for i in range(LIMIT - 5)]
TOO_LONG = "300"  # of every message


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a calibrated model that is kept to 300 of its 512 tokens."""
    folder = tmp_path_factory.mktemp("kept")
    source, out = folder / "source", folder / "out"
    source.mkdir()
    weights = random_weights(tiny_config("llama"), seed=3)
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "pt"})
    config = {**SIZES, "model_type": "llama", "tie_word_embeddings": True, "rope_parameters": ROPE}
    del config["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    write_tokenizer(source)
    convert.convert(str(source), out, convert.ConvertOptions(group_size=32))
    options = calibrate.CalibrateOptions(sparsity=0.4, tokens=1200, method="uniform")
    result = calibrate.calibrate(out, options, lambda *_: None)
    assert "windows of 300 tokens instead of 512" in result.note
    assert config_json.read_config(out)["spqt"]["calibration"]["window"] == LIMIT
    return out


@pytest.fixture(scope="module")
def loaded(kept):
    network, tokenizer, *_ = mlx_lm.load(str(kept))
    tokenizer._eos_token_ids = {-1}  # nothing but the length ends an answer
    return network, tokenizer


def test_windows_that_were_asked_for_are_refused_beyond_the_context(kept, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(3000))))
    quality = evaluating.evaluate(kept, text, evaluating.EvaluateOptions(windows=2), lambda *_: None)
    assert quality.window == LIMIT
    assert quality.table().endswith("windows of 300 tokens instead of 512: the model's context")
    for attempt in (
        lambda: evaluating.evaluate(kept, text, evaluating.EvaluateOptions(window=301), lambda *_: None),
        lambda: calibrate.calibrate(
            kept, calibrate.CalibrateOptions(window=301, restart=True), lambda *_: None
        ),
    ):
        with pytest.raises(SpqtError, match=TOO_LONG):
            attempt()


def test_bench_keeps_to_the_context(kept):
    default = bench.Options(model="any")
    deep = bench.Options(model="any", depths=(0, 280), prompt_tokens=(8,), generation_tokens=8)
    asked = bench.Options(model="any", prompt_tokens=(298,), generation_tokens=8)
    whole = default.complete()
    long = bench.dataclasses.replace(whole, prompt_tokens=(512,))
    shorter, notes = bench._within(LIMIT, default, long)
    assert bench._longest(list(bench._tests(shorter))) == LIMIT
    assert TOO_LONG in notes[0]
    assert bench._within(LIMIT, asked, asked) == (asked, [])
    assert bench._within(None, deep, deep) == (deep, [])
    deeper = bench.dataclasses.replace(deep, depths=(0, 295))
    with pytest.raises(UsageError, match=TOO_LONG):
        bench._within(LIMIT, deeper, deeper)
    few = {"prompt_tokens": (4,), "generation_tokens": 2, "repetitions": 2}
    with pytest.raises(UsageError, match=TOO_LONG):
        bench.run(bench.Options(model=str(kept), depths=(299,), **few))
    assert bench.run(bench.Options(model=str(kept), depths=(290,), **few)).rows


def test_mlx_lm_ends_at_the_context(loaded):
    *_, last = mlx_lm.stream_generate(*loaded, PROMPT, max_tokens=1000)
    assert (last.finish_reason, last.generation_tokens) == ("length", 5)
    assert len([token for token, _ in generate_step(mx.array(PROMPT), loaded[0], max_tokens=-1)]) == 5
    *_, last = mlx_lm.stream_generate(*loaded, PROMPT, 3)
    assert last.generation_tokens == 3


def test_mlx_lm_refuses_a_prompt_beyond_the_context(loaded):
    text = " ".join(map(str, range(400)))
    for attempt in (
        lambda: mlx_lm.generate(*loaded, text),
        lambda: next(generate_step(mx.array(PROMPT + PROMPT[:5]), loaded[0])),
        lambda: next(speculative_generate_step(mx.array(PROMPT + PROMPT), loaded[0], loaded[0])),
        lambda: batch_generate(*loaded, [PROMPT[:4], PROMPT + PROMPT]),
        lambda: perplexity.eval_ppl(loaded[0], mx.zeros((1, 301), mx.int32)),
    ):
        with pytest.raises(SpqtError, match=TOO_LONG):
            attempt()


def test_a_prompt_cache_counts(loaded):
    network, tokenizer = loaded
    cache = make_prompt_cache(network)
    list(generate_step(mx.array(PROMPT), network, max_tokens=0, prompt_cache=cache))
    assert context.held(cache) == len(PROMPT)
    *_, last = mlx_lm.stream_generate(network, tokenizer, [5, 6], prompt_cache=cache)
    assert (last.finish_reason, last.generation_tokens) == ("length", 3)
    with pytest.raises(SpqtError, match=TOO_LONG):
        mlx_lm.generate(network, tokenizer, [5, 6], prompt_cache=cache)
    batches = BatchGenerator(network, max_tokens=9)
    with pytest.raises(SpqtError, match=TOO_LONG):
        batches.insert([[5, 6]], caches=[cache])


def test_requests_of_a_batch_end_each_at_the_context(loaded):
    batch = batch_generate(*loaded, [PROMPT, PROMPT[:200]], max_tokens=[50, 20], return_token_ids=True)
    assert [len(tokens) for tokens in batch.token_ids] == [5, 20]


def test_drafts_end_at_the_context(loaded):
    network, tokenizer = loaded
    options = {"max_tokens": 99, "draft_model": network, "num_draft_tokens": 3}
    *_, last = mlx_lm.stream_generate(network, tokenizer, PROMPT, **options)
    assert (last.finish_reason, last.generation_tokens) == ("length", 5)


def test_a_model_without_a_limit_is_left_alone(converted):
    network, tokenizer, *_ = mlx_lm.load(str(converted))
    tokenizer._eos_token_ids = {-1}
    assert context.of(network) is None
    *_, last = mlx_lm.stream_generate(network, tokenizer, PROMPT, max_tokens=8)
    assert last.generation_tokens == 8


def test_a_damaged_limit_is_named(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "damaged")
    config = config_json.read_config(kept)
    config["spqt"]["context"] = "many"
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpqtError, match="context"):
        session.load(tmp_path / "damaged")


def test_lm_eval_cuts_a_context_to_the_models(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.evaluate", SimpleNamespace(DEFAULT_MAX_TOKENS=8192))
    network, tokenizer = loaded
    wrapper = SimpleNamespace(_model=network, tokenizer=tokenizer, _max_tokens=None, use_chat_template=False)
    question = lm_eval._encode(wrapper, "word " * 400, ["an end"])
    assert len(question.context) + len(question.endings[0]) == LIMIT
    with pytest.raises(SpqtError, match=TOO_LONG):
        lm_eval._encode(wrapper, "word", ["an end " * 400])


@pytest.fixture
def address(kept):
    """Where mlx-lm's server answers for the model."""
    arguments = SimpleNamespace(
        model=str(kept), adapter_path=None, draft_model=None, trust_remote_code=False, chat_template=None,
        use_default_chat_template=False, pipeline=False, chat_template_args={}, decode_concurrency=4,
        prompt_concurrency=4, prefill_step_size=64, prompt_cache_bytes=None, kv_bits=None, kv_group_size=64,
        quantized_kv_start=0, temp=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=64, num_draft_tokens=3,
        allowed_origins=["*"],
    )  # fmt: skip
    generator = server.ResponseGenerator(server.ModelProvider(arguments), server.LRUPromptCache())
    httpd = server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: server.APIHandler(generator, *given, system_fingerprint="x")
    )
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1/completions"
    httpd.shutdown()
    thread.join()
    httpd.server_close()
    generator.stop_and_join()


def test_the_server_refuses_a_long_prompt_and_goes_on(address):
    def ask(words, **more):
        body = json.dumps({"prompt": "a " * words, "max_tokens": 1000, **more}).encode()
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
            return json.loads(answer.read())

    for more in ({}, {"seed": 1}):  # in a batch, and alone
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(1000, **more)
        assert 400 <= refused.value.code < 500
        assert TOO_LONG in json.loads(refused.value.read())["error"]
        found = ask(60, logit_bias={"2": -100}, **more)
        assert found["usage"]["total_tokens"] == LIMIT
        assert found["choices"][0]["finish_reason"] == "length"


def test_a_loop_that_was_taken_early_is_hooked(kept):
    """A function's own name for a loop, bound before a model was loaded, has the hook all the same."""
    code = (
        "import spqt_cli.patch\n"
        "def early():\n"
        "    from mlx_lm.generate import generate_step, stream_generate\n"
        "    return generate_step, stream_generate\n"
        "found = early()\n"
        f"import mlx_lm; mlx_lm.load({str(kept)!r})\n"
        "print(*(one.__module__ + '.' + one.__code__.co_filename.rsplit('/', 1)[-1] for one in found))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["mlx_lm.generate.hooks_generate.py"] * 2
