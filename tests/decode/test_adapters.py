"""LoRA and DoRA on Zigzag layers: what they compute, dense and sparse, fused blocks beside them, training."""

import copy
import threading

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

from spqt_cli.backends import select
from spqt_cli.decode import fused, generate, phase, relayout, session
from spqt_cli.decode.layers import base, zigzag_layers
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import UnsupportedError
from tests.conftest import VOCAB, tiny_checkpoint
from tests.decode.test_generate import dequantized_copy, run
from tests.lib import adapters
from tests.lib.converting import run_path

KINDS = ("lora", "dora")
# Layers that one launch or one call computes together; of some only one has an adapter.
PLACES = {
    "all": None,
    "q and v": ["self_attn.q_proj", "self_attn.v_proj"],
    "k": ["self_attn.k_proj"],
    "o": ["self_attn.o_proj"],
    "up": ["mlp.up_proj"],
    "down": ["mlp.down_proj"],
}
TOLERANCE = 2e-4  # of the largest logit: float32 sums of up to 160 products in another order, twice
PARAMETERS = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def tokens(*shape):
    return mx.random.randint(0, VOCAB, shape, key=mx.random.key(9))


def logits(model, rows):
    """A prompt's logits, then those of single decode steps: a token of each of some sequences."""
    cache, prompt, steps = make_prompt_cache(model), tokens(rows, 7), tokens(rows, 3)
    found = [model(prompt, cache=cache)]
    for step in range(steps.shape[1]):
        with phase.decoding():
            found.append(model(steps[:, step : step + 1], cache=cache))
    return np.array(mx.concatenate(found, axis=1))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_adapters_give_what_they_give_on_dense_matrices(calibrated, tmp_path, kind, place):
    """Prompts, single steps and steps of several sequences; thresholds mask the base alone."""
    loaded, plain = adapters.pair(calibrated, tmp_path / "adapter", kind, PLACES[place])
    assert all(layer.threshold is not None for layer in zigzag_layers(loaded.model).values())
    for rows in (1, 3):
        assert_close(logits(loaded.model, rows), expected := logits(plain, rows))
    assert np.abs(logits(session.load(calibrated).model, 3) - expected).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_layers_with_a_bias_and_blocks_of_another_form(tmp_path, kind, arch):
    converted = run_path(tiny_checkpoint(tmp_path / "source", arch), tmp_path / "out")
    loaded, plain = adapters.pair(converted, tmp_path / "adapter", kind)
    definitions = dict(plain.named_modules())
    for path, layer in zigzag_layers(loaded.model).items():
        layer.set_threshold(0.2)
        definitions[path]._threshold = layer.threshold
    assert_close(logits(loaded.model, 1), logits(plain, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_without_thresholds_they_are_those_of_mlx_lm_itself(converted, tmp_path, kind):
    """mlx-lm's own classes around plain layers, token for token."""
    plain = dequantized_copy(session.load(converted, dense=True))
    adapters.write(tmp_path, plain, kind)
    loaded = session.load(converted, adapter_path=str(tmp_path), dense=True)
    prompt = generate.encode(loaded, Prompt("the quick brown fox"))
    ours, theirs = (
        [step.token for step in mlx_lm.stream_generate(model, loaded.tokenizer, prompt, max_tokens=32)]
        for model in (loaded.model, plain)
    )
    assert ours == theirs
    assert_close(logits(loaded.model, 2), logits(plain, 2))


def test_other_backends_compute_the_same(calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("SPQT_BACKEND", "stock")
    for kind in KINDS:
        loaded, plain = adapters.pair(calibrated, tmp_path / kind, kind)
        assert select.backend().name == "stock"
        assert_close(logits(loaded.model, 1), logits(plain, 1))


@pytest.mark.skipif(select.backend().name != "cpu", reason="blocks run fused there")
def test_a_block_with_an_adapter_steps_aside_and_says_so(calibrated, tmp_path):
    loaded, _ = adapters.pair(calibrated, tmp_path, "lora", PLACES["q and v"])
    first, adapted = loaded.model.layers
    first.self_attn.update_modules({name: base(first.self_attn[name]) for name in ("q_proj", "v_proj")})
    logits(loaded.model, 1)
    report = fused.report(loaded.model)
    assert (report.blocks, report.fused) == (2, 1)
    assert report.reasons == {"adapters on q_proj and v_proj": 1}
    assert adapted.mlp.__dict__[fused.MLP]._step is not None  # its gated module still runs as one call
    shared = [base(adapted.self_attn[name]).shared_input for name in ("q_proj", "k_proj", "v_proj")]
    assert len({id(one) for one in shared}) == 1  # and q, k and v in one launch


def test_taking_the_adapters_off_gives_the_model_back(calibrated, tmp_path):
    loaded, _ = adapters.pair(calibrated, tmp_path, "lora")
    with_adapter = logits(loaded.model, 1)
    remove_lora_layers(loaded.model)
    without = logits(loaded.model, 1)
    assert np.array_equal(without, logits(session.load(calibrated).model, 1))
    assert not np.array_equal(with_adapter, without)


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_and_statistics_know_the_layers_within(calibrated, tmp_path, kind):
    adapters.pair(calibrated, tmp_path, kind)
    plain, adapted = (session.load(calibrated, adapter_path=one) for one in (None, str(tmp_path)))
    assert zigzag_layers(plain.model).keys() == zigzag_layers(adapted.model).keys()
    text, statistics = run(adapted)
    assert statistics.sparsity == pytest.approx(run(plain)[1].sparsity, abs=0.15)
    assert text != run(plain)[0]
    sparser = session.load(calibrated, adapter_path=str(tmp_path), sparsity=0.8)
    assert run(sparser)[1].sparsity > statistics.sparsity + 0.1
    assert run(session.load(calibrated, adapter_path=str(tmp_path), dense=True))[1].sparsity == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_goes_back_to_rows_keeps_its_adapter(converted, tmp_path, kind):
    """As a device's profile may ask for."""
    loaded, _ = adapters.pair(converted, tmp_path, kind)
    path, adapter = "model.layers.0.self_attn.q_proj", loaded.model.layers[0].self_attn.q_proj
    x = mx.random.normal((1, 9, 64), key=mx.random.key(1))
    with_base, own = np.array(adapter(x)), np.array(adapter(x) - adapter.linear(x))
    relayout.to_rows(loaded.model, {path: zigzag_layers(loaded.model)[path]})
    assert loaded.model.layers[0].self_attn.q_proj is adapter
    assert type(adapter.linear) is nn.QuantizedLinear
    change = np.linalg.norm(np.array(adapter(x)) - with_base)  # a second rounding to 4 bits
    assert 0 < change < 0.15 * np.linalg.norm(with_base)
    assert np.linalg.norm(own) > 2 * change


@pytest.mark.parametrize("head", ["lm_head", "model.embed_tokens"])
def test_adapters_on_heads(tmp_path, head):
    """Row-grouped, as they are stored, and in Zigzag, as a profile may have them."""
    tied = head != "lm_head"
    source = tiny_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=tied)
    converted = run_path(source, tmp_path / "out")
    loaded, plain = adapters.pair(converted, tmp_path / "adapter", "lora", [head])
    expected = logits(plain, 1)
    assert_close(logits(loaded.model, 1), expected)
    bare = session.load(converted)
    assert relayout.head_to_zigzag(bare.model, relayout.find_head(bare.model)) < 0.2
    zigzag = logits(bare.model, 1)
    linear_to_lora_layers(bare.model, -1, {**PARAMETERS, "keys": [head]})
    assert np.array_equal(logits(bare.model, 1), zigzag)  # B is zero at first
    mx.eval(bare.model.load_weights(str(tmp_path / "adapter" / "adapters.safetensors"), strict=False))
    bare.model.eval()
    shift, wanted = (
        (logits(bare.model, 1) - zigzag) * 1.5,
        expected - logits(session.load(converted).model, 1),
    )
    if not tied:  # the scale above is two thirds; a tied embedding moves the input as well
        np.testing.assert_allclose(shift, wanted, atol=TOLERANCE * np.abs(wanted).max())
    assert np.abs(shift).max() > 0.05


def loss(model, batch):
    return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "backend"), [("llama", ""), ("qwen2", ""), ("qwen2", "stock")])
def test_gradients_are_those_of_the_dense_matrices(tmp_path, monkeypatch, kind, arch, backend):
    """Through the frozen base, norms, attention and head, by whatever computes them."""
    if backend:
        monkeypatch.setenv("SPQT_BACKEND", backend)
    converted = run_path(tiny_checkpoint(tmp_path / "source", arch), tmp_path / "out")
    loaded = session.load(converted, dense=True)
    plain = dequantized_copy(loaded)
    found = []
    for model in (loaded.model, plain):
        model.freeze()
        mx.random.seed(4)
        linear_to_lora_layers(model, -1, PARAMETERS, use_dora=kind == "dora")
        for path, module in model.named_modules():
            if "lora_b" in module:
                key = mx.random.key(len(path))
                module.lora_b = mx.random.normal(module.lora_b.shape, key=key) * 0.1
        model.train()
        value, gradients = nn.value_and_grad(model, loss)(model, tokens(2, 17))
        found.append((value.item(), dict(tree_flatten(gradients))))
    (ours, our_slopes), (theirs, their_slopes) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_slopes.keys() == their_slopes.keys()
    assert {name.rsplit(".", 1)[1] for name in our_slopes} == {"lora_a", "lora_b"} | (
        {"m"} if kind == "dora" else set()
    )
    for name, slope in their_slopes.items():
        assert_gradient(our_slopes[name], slope)


def assert_gradient(found, expected):
    size = np.abs(np.array(expected)).max()
    assert size > 0
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-3 * size)


def test_norms_have_gradients_too(converted):
    loaded = session.load(converted, dense=True)
    plain = dequantized_copy(loaded)
    found = []
    for model in (loaded.model, plain):
        model.freeze()
        for layer in model.layers:
            layer.input_layernorm.unfreeze()
        gradients = nn.value_and_grad(model, loss)(model, tokens(2, 17))[1]
        found.append(dict(tree_flatten(gradients)))
    assert len(found[0]) == 2
    for name, slope in found[1].items():
        assert_gradient(found[0][name], slope)


@pytest.mark.parametrize("path", ["model.layers.0.mlp.up_proj", "model.embed_tokens"])
def test_packed_weights_are_not_trained_in_silence(converted, path):
    """As `--fine-tune-type full` would; MLX's own packed layers answer alike."""
    model = session.load(converted, dense=True).model
    model.freeze()
    dict(model.named_modules())[path].unfreeze()
    with pytest.raises(RuntimeError, match="no gradient wrt the quantized weights"):
        nn.value_and_grad(model, loss)(model, tokens(2, 17))


def test_dora_keeps_its_factors_until_an_array_changes(calibrated, tmp_path):
    loaded, _ = adapters.pair(calibrated, tmp_path, "dora")
    adapter = loaded.model.layers[0].self_attn.q_proj
    x = mx.random.normal((1, 4, 64))
    before = np.array(adapter(x))
    kept = adapter._factors()
    assert adapter._factors() is kept
    adapter.m = adapter.m * 2
    np.testing.assert_allclose(np.array(adapter(x)), before * 2, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(adapter)
    twin.lora_b = twin.lora_b * 0
    assert np.abs(np.array(twin(x)) - before * 2).max() > 0.05
    adapter.train()
    assert adapter._factors() is not adapter._factors()


def test_factors_may_be_used_in_another_thread(calibrated, tmp_path):
    """The server loads and generates in one thread, and may have warmed up in another."""
    loaded, _ = adapters.pair(calibrated, tmp_path, "dora")
    adapter, x, found = loaded.model.layers[0].self_attn.q_proj, mx.ones((1, 4, 64)), []
    expected = np.array(adapter(x))
    thread = threading.Thread(target=lambda: found.append(np.array(adapter(x))))
    thread.start()
    thread.join()
    assert np.array_equal(found[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lms_own_fuse_is_refused_in_a_line(converted, tmp_path, kind):
    loaded, _ = adapters.pair(converted, tmp_path, kind)
    with pytest.raises(UnsupportedError, match="can't write Zigzag") as raised:
        loaded.model.layers[0].self_attn.q_proj.fuse()
    assert "spqt fuse" in raised.value.hint
