"""A settled config: what is dropped is put in, told or refused by name."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from spqt_cli.convert import convert, parameters, source
from spqt_cli.convert.config import definition
from spqt_cli.decode import context, exact, generate, session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError, UnsupportedError
from tests import ROOT
from tests.conftest import SIZES, random_weights, tiny_checkpoint, tiny_config, write_tokenizer
from tests.convert.config import config_table, fuzz_configs

WITHOUT_BASE = {key: value for key, value in SIZES.items() if key != "rope_theta"}
NEW = {"rope_type": "default", "rope_theta": 500.0}


def checkpoint(
    folder: Path, config: dict[str, Any], built: dict[str, Any], **tensors: mx.array
) -> source.Checkpoint:
    """config: as written. built: what mlx-lm's class needs for the names and shapes of the weights."""
    folder.mkdir()
    weights = random_weights(built, seed=3) | {
        name.replace("__", "."): each for name, each in tensors.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return source.open_folder(folder, source.Trust(requantize=True))


@pytest.mark.parametrize("seed", range(40))
def test_random_config_is_computed_or_refused_by_name(seed, tmp_path):
    assert fuzz_configs.Runner(tmp_path).case(seed) in ("agrees", "refused")


def test_window_survives_conversion_and_mlx_lm_load(tmp_path):
    config = {**SIZES, "model_type": "mistral", "sliding_window": 9, "tie_word_embeddings": True}
    checkpoint(tmp_path / "source", config, config)
    convert.convert(str(tmp_path / "source"), tmp_path / "out", convert.ConvertOptions(group_size=32))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["spqt"]["windows"] == [9, 9]
    network = session.load(tmp_path / "out").model
    assert [type(each) for each in make_prompt_cache(network)] == [RotatingKVCache] * 2
    # Two layers of 9 tokens see 17: what stands before can't change the last token.
    tail = list(range(30, 47))
    first, second = (network(mx.array([[start] * 20 + tail]))[0, -1] for start in (5, 99))
    assert mx.allclose(first, second, atol=1e-5)


def test_new_spelling_is_written_in_the_old_one(tmp_path):
    config = {**WITHOUT_BASE, "model_type": "llama", "tie_word_embeddings": True, "rope_parameters": NEW}
    opened = checkpoint(tmp_path / "source", config, tiny_config("llama"))
    parameters.load(opened)
    assert opened.config["rope_theta"] == 500.0
    assert "rope_parameters" not in opened.config
    settled = json.dumps(opened.config)
    parameters.load(opened)  # a plan is made more than once
    assert json.dumps(opened.config) == settled


PARTS = ("weight", "scales", "biases")


def test_quantized_source_is_loaded_by_its_settled_config(tmp_path):
    config = {**WITHOUT_BASE, "model_type": "llama", "tie_word_embeddings": True, "rope_parameters": NEW}
    packed: dict[str, mx.array] = {}
    for name, value in random_weights(tiny_config("llama"), seed=3).items():
        if name.endswith("_proj.weight"):
            parts = mx.quantize(value, group_size=32, bits=4)
            packed |= {name.replace("weight", each): part for each, part in zip(PARTS, parts, strict=True)}
        else:
            packed[name] = value
    folder = tmp_path / "source"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), packed, metadata={"format": "mlx"})
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    network, _, _ = parameters.load(source.open_folder(folder, source.Trust(requantize=True)))
    assert network.model.layers[0].self_attn.rope.base == 500.0


LONGROPE = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "rope_theta": 1e4}


@pytest.mark.parametrize(("original", "refused"), [(300, False), (200, True)])
def test_longrope_is_kept_to_its_short_factors(original, refused, tmp_path):
    rope = {**LONGROPE, "original_max_position_embeddings": original}
    config = {**WITHOUT_BASE, "model_type": "llama", "tie_word_embeddings": True, "rope_parameters": rope}
    opened = checkpoint(tmp_path / "source", config, tiny_config("llama"))
    if refused:
        with pytest.raises(UnsupportedError, match="200 tokens"):
            parameters.load(opened)
        return
    result = convert.convert(str(opened.folder), tmp_path / "out", convert.ConvertOptions(group_size=32))
    assert any("300 tokens" in warning for warning in result.warnings)
    loaded = session.load(tmp_path / "out")
    assert context.tokens(loaded.config) == 300
    with pytest.raises(SpqtError, match="300"):
        generate.encode(loaded, Prompt("a b " * 400, ignore_chat_template=True))


def test_other_head_wins_over_a_wrong_tie(tmp_path):
    head = mx.random.normal((512, 64), key=mx.random.key(5))
    config = tiny_config("llama")  # says tied
    opened = checkpoint(tmp_path / "source", config, config, lm_head__weight=head)
    _, weights, _ = parameters.load(opened)
    assert mx.array_equal(weights["lm_head.weight"], head)
    assert opened.config["tie_word_embeddings"] is False
    assert "lm_head" in opened.warnings[0]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # the class of the second has no head
def test_second_copy_of_the_embedding_is_dropped(kind, tmp_path):
    config = {**tiny_config("llama"), "model_type": kind, "query_pre_attn_scalar": 16}
    weights = random_weights(config, seed=3)
    opened = checkpoint(
        tmp_path / "source", config, config, lm_head__weight=weights["model.embed_tokens.weight"]
    )
    assert "lm_head.weight" not in parameters.load(opened)[1]


def test_other_head_that_has_no_place_is_refused(tmp_path):
    config = {**tiny_config("llama"), "model_type": "gemma2", "query_pre_attn_scalar": 16}
    opened = checkpoint(tmp_path / "source", config, config, lm_head__weight=mx.zeros((512, 64)))
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight"):
        parameters.load(opened)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "hidden_act", "gelu"), ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "use_bidirectional_attention", True), ("starcoder2", "use_bias", False),
        ("mixtral", "head_dim", 32), ("mistral", "hidden_act", "relu"),
        ("gemma3_text", "attn_logit_softcapping", 5.0),
    ],
)  # fmt: skip
def test_key_without_a_reader_is_refused_by_name(kind, key, value, tmp_path):
    config = {**SIZES, "model_type": kind, "tie_word_embeddings": True, "num_local_experts": 4}
    opened = checkpoint(tmp_path / "source", {**config, key: value}, config)
    with pytest.raises(UnsupportedError, match=key):
        parameters.load(opened)


@pytest.mark.parametrize(
    "kind",
    ["apertus", "cohere2", "ernie4_5", "exaone4", "glm4", "glm4_moe", "gpt_neox", "granite", "granitemoe",
     "helium", "lfm2", "mamba2", "olmo3", "qwen3_moe", "stablelm", "deepseek_v2", "gpt_oss"],
)  # fmt: skip
def test_config_as_transformers_writes_it_is_not_called_damaged(kind):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from spqt_cli.convert.config import settle

    config = CONFIG_MAPPING[kind](num_hidden_layers=4).to_dict()
    opened = source.Checkpoint(kind, Path("."), json.loads(json.dumps(config, default=str)), {})
    settle.settle(opened, lambda settled: parameters.build(settled, kind))
    assert opened.exact is not None


@pytest.mark.parametrize(
    "section",
    [
        {"ropes": [{"paths": ["model.layers.9.self_attn.rope"], "angles": [1.0], "scale": 1.0}]},
        {"ropes": [{"paths": ["model.layers.0.self_attn.rope"], "angles": "x", "scale": 1.0}]},
        {"ropes": 5}, {"windows": [4]}, {"windows": "ab"}, {"windows": [{}, 4]},
    ],
)  # fmt: skip
def test_damaged_section_is_an_error_of_ours(section):
    network = parameters.build(tiny_config("llama"), "tiny")
    with pytest.raises(SpqtError, match="damaged"):
        exact.complete(network, section)


def test_exact_rope_turns_as_mlx_does():
    x = mx.random.normal((1, 2, 5, 16), key=mx.random.key(0))
    angles = (100.0 ** (-np.arange(0, 16, 2) / 16)).tolist()
    for traditional in (False, True):
        rope = exact.ExactRoPE(angles, 1.0, traditional)
        wanted = mx.fast.rope(x, 16, traditional=traditional, base=100.0, scale=1.0, offset=3)
        assert mx.allclose(rope(x, offset=3), wanted, atol=1e-5)


def test_table_of_keys_is_that_of_the_installed_mlx_lm():
    page = ROOT / "docs" / "config-keys.md"
    assert page.read_text() == config_table.text(), (
        "python -m tests.convert.config.config_table > docs/config-keys.md"
    )


def test_tiny_checkpoints_of_before_are_settled_to_the_same(tmp_path):
    opened = source.open_folder(tiny_checkpoint(tmp_path / "source", "gemma3"), source.Trust())
    parameters.load(opened)
    assert opened.exact == {}
    assert all("lm_head" in warning for warning in opened.warnings)  # gemma3 ties, and a head is stored


@pytest.mark.parametrize(
    ("kind", "width", "heads"),
    [
        ("unknown", "hidden_size", "num_attention_heads"), ("unknown", "n_embd", "n_head"),
        ("unknown", "hidden_dim", "num_heads"), ("dbrx", "d_model", "n_heads"),
    ],
)  # fmt: skip
def test_width_of_a_head_is_the_configs_under_its_other_names(kind, width, heads):
    """Not that of transformers' defaults, and not 0, by which a rotary module would have no angles."""
    config = {"model_type": kind, width: 96, heads: 4, "n_layers": 2, "rope_theta": 1e4}
    assert definition.read(config, config).head_dim == 24


@pytest.mark.parametrize("base", ["x", 0, -1, float("nan"), float("inf"), True, [1e4]])
@pytest.mark.parametrize("new", [False, True])
def test_base_that_is_no_positive_number_is_an_error_of_ours(base, new, tmp_path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": base}} if new else {"rope_theta": base}
    config = {**WITHOUT_BASE, "model_type": "llama", "tie_word_embeddings": True, **rope}
    with pytest.raises(SpqtError, match="rope_theta is"):
        parameters.load(checkpoint(tmp_path / "source", config, tiny_config("llama")))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "no_such", "rope_theta": 500.0},
        {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
        {"full_attention": NEW, "sliding_attention": {**NEW, "rope_theta": 7.0}},
    ],
)
def test_rope_that_a_class_only_warns_of_is_refused(rope, tmp_path):
    """mlx-lm's phi3 prints a line and turns as if nothing were said."""
    config = {**WITHOUT_BASE, "model_type": "phi3", "tie_word_embeddings": True}
    config |= {"original_max_position_embeddings": 512}
    opened = checkpoint(tmp_path / "source", {**config, "rope_parameters": rope}, config)
    with pytest.raises(UnsupportedError, match=r"rotary positions by rope_type|by layer type"):
        parameters.load(opened)


@pytest.mark.parametrize("said", [True, False])
def test_a_head_that_gemma3_keeps_is_told_where_the_config_ties(said, tmp_path):
    """Its class reads no tie_word_embeddings: it has a head where one is stored."""
    config = {**tiny_config("gemma3"), "tie_word_embeddings": said}
    head = mx.random.normal((512, 64), key=mx.random.key(5))
    opened = checkpoint(tmp_path / "source", config, config, lm_head__weight=head)
    _, weights, _ = parameters.load(opened)
    assert mx.array_equal(weights["lm_head.weight"], head)
    assert opened.config["tie_word_embeddings"] is False
    assert [line for line in opened.warnings if "lm_head" in line] == opened.warnings
    assert bool(opened.warnings) is said


@pytest.mark.parametrize(
    ("key", "value"),
    [("sliding_window", "4096"), ("sliding_window", 9.5), ("layer_types", [1, 2]), ("layer_types", 3)],
)
def test_a_value_that_transformers_refuses_is_no_fault_of_the_tokenizer(key, value, tmp_path):
    config = {**SIZES, "model_type": "mistral", "tie_word_embeddings": True}
    opened = checkpoint(tmp_path / "source", {**config, key: value}, config)
    with pytest.raises(SpqtError, match=rf"config\.json: .*'{key}'") as refused:
        convert.convert(str(opened.folder), tmp_path / "out", convert.ConvertOptions(group_size=32))
    assert "tokenizer" not in refused.value.cause


def test_a_size_that_is_null_is_named(tmp_path):
    config = {**tiny_config("llama"), "model_type": "nemotron", "hidden_act": "relu2", "norm_eps": 1e-5}
    opened = checkpoint(tmp_path / "source", {**config, "num_key_value_heads": None}, config)
    with pytest.raises(SpqtError, match="does not say num_key_value_heads"):
        parameters.load(opened)


def test_a_part_of_a_model_is_unsupported(tmp_path):
    """transformers' pixtral is the vision tower of llava; mlx-lm's is a whole model."""
    config = {"model_type": "pixtral", "hidden_size": 64, "num_hidden_layers": 2}
    opened = checkpoint(tmp_path / "source", config, tiny_config("llama"))
    with pytest.raises(UnsupportedError, match="text_config"):
        parameters.load(opened)
