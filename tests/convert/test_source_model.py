"""A source's own model in memory, unquantized or row-grouped, from a folder or a .gguf file."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from spqt_cli.convert import source_model
from spqt_cli.decode import context
from tests.conftest import random_weights, tiny_config
from tests.lib.writing_gguf import write_model

TOKENS = mx.array([[1, 7, 9, 30, 200]])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    config = tiny_config("llama")
    weights = {name: np.array(weight) for name, weight in random_weights(config, 0).items()}
    return write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", config, weights)


def test_weights_are_the_checkpoints(checkpoint):
    model = source_model.load(str(checkpoint))
    stored = mx.load(str(checkpoint / "model.safetensors"))
    found = dict(tree_flatten(model.parameters()))
    assert found.keys() == stored.keys()
    assert all(mx.array_equal(found[name], stored[name].astype(mx.float32)) for name in stored)
    assert context.of(model) == 512


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_rows_are_what_nn_quantize_makes(checkpoint, gguf, kind):
    name = str(checkpoint if kind == "folder" else gguf)
    rows = {"model.embed_tokens": (8, 64), "model.layers.0.self_attn.q_proj": (4, 32)}
    model, expected = source_model.load(name, rows), source_model.load(name)
    nn.quantize(
        expected,
        class_predicate=lambda path, _: path in rows and {"bits": rows[path][0], "group_size": rows[path][1]},
    )
    assert source_model.settings_of(model) == rows
    ours, theirs = (dict(tree_flatten(each.parameters())) for each in (model, expected))
    assert ours.keys() == theirs.keys()
    if kind == "folder":
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    else:  # ours is rounded as the file's float16, not as float32
        a, b = (np.array(each(TOKENS)) for each in (model, expected))
        assert np.std(a - b) < 0.01 * np.std(b)


def test_eight_bits_hold_all_that_can_be(checkpoint, gguf):
    for name in (checkpoint, gguf):
        opened = source_model.open_source(str(name))
        model = source_model.build(opened, source_model.eight_bits(opened))
        left = {path for path, one in model.named_modules() if type(one) in (nn.Linear, nn.Embedding)}
        assert left == {f"model.layers.{index}.mlp.down_proj" for index in (0, 1)}  # 160 inputs
        whole = source_model.load(str(name))(TOKENS)
        assert np.std(np.array(model(TOKENS) - whole)) < 0.03 * np.std(np.array(whole))
