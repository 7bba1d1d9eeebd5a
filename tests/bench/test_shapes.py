"""Shapes: the sizes are those of the published models."""

import pytest
from mlx.utils import tree_flatten

from spqt_cli.bench import shapes
from spqt_cli.errors import UsageError

# Parameters as published with each model (model cards and safetensors indexes); tied embeddings once.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,  # without the layers that predict further tokens, here and below
    "glm-4.5-air": 106_852_251_264,
    "minimax-m2": 228_689_764_864,
}


def test_every_shape_is_checked():
    assert set(shapes.names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name):
    from mlx_lm.utils import _get_classes

    config = shapes.config(name)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))  # lazy: nothing is computed
    assert sum(array.size for _, array in tree_flatten(model.parameters())) == PARAMETERS[name]


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(UsageError) as error:
        shapes.config("gpt-5")
    assert "llama-3-8b" in error.value.hint


@pytest.mark.parametrize("blocks", [0, -1, 33])
def test_blocks_out_of_range(blocks):
    with pytest.raises(UsageError, match="32 blocks"):
        shapes.config("llama-3-8b", blocks)
