"""Probes on every architecture: masked rows are decode steps, also through sliding windows."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import phase, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.measure import probes
from tests.conftest import tiny_checkpoint


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def folder(request, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    source = tiny_checkpoint(base / "source", request.param)
    convert.convert(str(source), base / "model", convert.ConvertOptions(bits=4, group_size=32))
    # windows of 160 tokens: a prompt of 80 is longer than gemma3's sliding window of 64
    options = calibrate.CalibrateOptions(sparsity=0.4, tokens=640, window=160, method="auto")
    result = calibrate.calibrate(base / "model", options, lambda *_: None)
    # 80 held-out tokens of other words
    assert result.realised == pytest.approx(0.4, abs=0.03)
    assert min(one.kl for one in result.tried) == result.tried[0].kl
    return base / "model"


def test_masked_rows_are_one_token_steps(folder):
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array(np.random.default_rng(1).integers(5, 500, (1, 100)))
    loaded = session.load(folder)
    cache = make_prompt_cache(loaded.model)
    loaded.model(tokens[:, :80], cache=cache)
    with phase.decoding():
        steps = [loaded.model(tokens[:, i : i + 1], cache=cache) for i in range(80, 100)]
    layers = zigzag_layers(loaded.model)
    with probes.probing(loaded.model) as harness:
        cache = probes.prompt_cache(loaded.model, tokens[:, :80])
        masking = probes.Masking({path: layer.threshold.item() for path, layer in layers.items()})
        with harness.masked(masking):
            masked = [probes.continuation(loaded.model, tokens[:, 80:], cache) for _ in range(2)]
    # float32 in another order of summation
    assert mx.allclose(masked[0], mx.concatenate(steps, axis=1), rtol=1e-3, atol=1e-3)
    assert mx.array_equal(masked[0], masked[1])  # the cached prompt is not used up


def test_weighted_counts_dense_layers_as_zero(folder):
    layers = zigzag_layers(session.load(folder).model)
    whole = sum(layer.inputs * layer.outputs for layer in layers.values())
    one = next(iter(layers))
    expected = 0.5 * layers[one].inputs * layers[one].outputs / whole
    assert probes.weighted({one: 0.5}, layers) == pytest.approx(expected)


def test_a_context_that_fails_leaves_nothing_set(folder):
    loaded = session.load(folder, dense=True)
    tokens = mx.array([[5, 6, 7, 8]])
    expected = loaded.model(tokens)
    with probes.probing(loaded.model) as harness:
        masking = probes.Masking(dict.fromkeys(harness.layers, 1e9))
        for context in (harness.masked(masking), harness.counting(), harness.differentiated()):
            with pytest.raises(KeyError), context:
                raise KeyError
        seen = harness.layers["model.layers.0.mlp.up_proj"].inputs
        assert mx.allclose(loaded.model(tokens), expected, rtol=1e-3, atol=1e-3)
        assert masking.realised() == {}
        with harness.counting() as counts:
            mx.eval(loaded.model(tokens))
        assert counts["model.layers.0.mlp.up_proj"].sum() == tokens.size * seen  # of this pass alone


class ByName(nn.Module):
    def __call__(self, inputs, scale=1):
        return inputs * scale


def test_hooks_see_an_input_that_is_given_by_name():
    """GPT-J calls its blocks so; a hook inside another's block sees it too."""
    module, seen = ByName(), []

    def hook(of, call, x, *rest, **named):
        seen.append((x.item(), rest, named))
        return call(of, x, *rest, **named)

    with probes.hooked([module], hook), probes.hooked([module], hook):
        assert module(inputs=mx.array(3), scale=2).item() == 6
        assert module(mx.array(4), 5).item() == 20
    assert seen == [(3, (), {"scale": 2})] * 2 + [(4, (5,), {})] * 2
    assert module(inputs=mx.array(3)).item() == 3
