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
from spqt_cli.measure import many_rows, probes
from tests.conftest import tiny_checkpoint
from tests.lib.mixture import PROJECTIONS, tiny_mixture


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "mixture"])
def folder(request, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    if request.param == "mixture":
        source = tiny_mixture(base / "source")
    else:
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
    sizes = {
        path: layer.inputs * layer.outputs * (2 if path in PROJECTIONS else 1)  # of experts, two are read
        for path, layer in layers.items()
    }
    one = next(iter(layers))
    expected = 0.5 * sizes[one] / sum(sizes.values())
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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    base = tmp_path_factory.mktemp("probed")
    source = tiny_mixture(base / "source")
    convert.convert(str(source), base / "model", convert.ConvertOptions(bits=4, group_size=32))
    return session.load(base / "model", dense=True).model


def test_rows_of_experts_are_watched_in_the_order_of_positions(mixture):
    """mlx-lm sorts 64 rows and more by expert: 40 tokens of 2 experts are, 20 are not."""
    tokens = mx.array(np.random.default_rng(3).integers(5, 500, (1, 40)))
    gate, up, down = PROJECTIONS
    with probes.probing(mixture) as harness:
        whole = mixture(tokens)
        seen = {}
        for path in (gate, down):
            rows = np.zeros((1, 40), bool)
            rows[0, 25:] = True
            masking = probes.Masking({path: 1e9})
            with harness.masked(masking, rows):
                seen[path] = mixture(tokens)
            assert masking.realised()[path] == 1
            same = np.abs(np.array(seen[path] - whole)[0]).max(axis=-1) < 1e-5
            assert same[:25].all()  # what is before the masked positions
            assert not same[25:].any()
        with harness.counting(10, 40) as late:
            mx.eval(mixture(tokens))
        with harness.counting() as counts:
            mx.eval(mixture(tokens))
    inputs = {path: harness.layers[path].inputs for path in PROJECTIONS}
    for path, each in ((gate, 1), (up, 1), (down, 2)):
        assert counts[path].sum() == 40 * each * inputs[path]
        assert late[path].sum() == 30 * each * inputs[path]


def test_sorted_rows_have_the_gradients_of_rows_that_are_not(mixture):
    """A position's row has one gradient, over all its experts, however their rows are laid out."""
    tokens = mx.array(np.random.default_rng(4).integers(5, 500, (1, 40)))
    with probes.probing(mixture) as harness:

        def slopes(network_tokens):
            with harness.differentiated() as found, many_rows.many_rows():

                def objective(origin):
                    found.origin = origin
                    return mixture(network_tokens)[:, :20].sum()

                mx.eval(mx.grad(objective)(found.origin))
                found.evaluate()
            return {path: (x, g) for path, x, g in found.pairs()}

        alone, beside = slopes(tokens[:, :20]), slopes(tokens)
    for path in PROJECTIONS:
        for few, many in zip(alone[path], beside[path], strict=True):
            first = many.reshape(-1, many.shape[-1])[: few.size // few.shape[-1]]
            assert mx.allclose(first, few.reshape(first.shape), rtol=1e-3, atol=1e-4)
