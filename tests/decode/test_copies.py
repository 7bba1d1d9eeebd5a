"""copy.deepcopy of a loaded model: a model of its own that gives the same logits."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from spqt_cli.decode import attention_cpu, fused, phase, session
from spqt_cli.decode.layers import zigzag_layers

STEPS = (fused.MLP, fused.BLOCK, attention_cpu.ATTRIBUTE)
PROMPT = mx.array([[5, 9, 40, 7, 300]])


def decoded(network: nn.Module, steps: int = 3) -> np.ndarray:
    """The logits (steps, vocabulary) of greedy decoding after a prompt."""
    cache = make_prompt_cache(network)
    found = [network(PROMPT, cache=cache)[0, -1]]
    with phase.decoding():
        for _ in range(steps):
            found.append(network(mx.argmax(found[-1])[None, None], cache=cache)[0, -1])
    return np.array(mx.stack(found[1:]))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_a_copy_gives_the_same_logits(calibrated, dense, warm):
    network = session.load(calibrated, dense=dense).model
    before = decoded(network) if warm else None  # warm: native steps, which no copy can take along, are there
    twin = copy.deepcopy(network)
    np.testing.assert_array_equal(decoded(twin), decoded(network) if before is None else before)


def test_a_copy_is_independent(calibrated):
    network = session.load(calibrated).model
    before = decoded(network)
    twin = copy.deepcopy(network)
    layers, copies = zigzag_layers(network), zigzag_layers(twin)
    assert layers.keys() == copies.keys()
    assert not {id(layer) for layer in layers.values()} & {id(layer) for layer in copies.values()}
    for path, layer in copies.items():
        group = layer.shared_input.layers
        assert {id(one) for one in group} <= {id(one) for one in copies.values()}, path
        layer.scales = layer.scales * 0
        layer.biases = layer["biases"] * 0
        layer.set_threshold(None)
    np.testing.assert_array_equal(decoded(network), before)
    assert not np.allclose(decoded(twin), before)


def test_a_copy_runs_by_its_own_modules(calibrated):
    """Of each kind of object that holds modules: the copy's holds the copy's."""
    network = session.load(calibrated).model
    decoded(network)
    twin = copy.deepcopy(network)
    own = {id(module) for module in twin.modules()}
    held = [
        module.__dict__[name].module for module in twin.modules() for name in STEPS if name in module.__dict__
    ]
    assert len(held) == sum(name in module.__dict__ for module in network.modules() for name in STEPS)
    assert all(id(module) in own for module in held)
