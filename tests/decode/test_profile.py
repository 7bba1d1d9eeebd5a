"""Profiles: where they are kept, whom they belong to, and what following one does to a model."""

import dataclasses
import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx import nn

from spqt_cli.backends import select
from spqt_cli.bench import models
from spqt_cli.convert import convert
from spqt_cli.decode import profile, relayout, session
from spqt_cli.decode.layers import ZigzagLinear, zigzag_layers
from spqt_cli.decode.profile import ROWS, SPARSE, ZIGZAG, Choice
from spqt_cli.errors import UsageError
from spqt_cli.format import thresholds
from tests.conftest import tiny_config
from tests.lib.backends import DEFINITION, EMULATED

PATHS = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loaded(arch: str = "llama", sparsity: float = 0.4, group_size: int = 32) -> SimpleNamespace:
    """A tiny model as `session.load` returns it, every layer with a threshold of that sparsity."""
    mx.random.seed(7)
    config = tiny_config(arch)
    model = models.random_model(config, 4, group_size, mx.float32)
    curve = [share * 2.0 for share in thresholds.CURVE_SPARSITIES]
    layers = zigzag_layers(model)
    for layer in layers.values():
        layer.set_threshold(sparsity * 2.0)
    folder = SimpleNamespace(curves=dict.fromkeys(layers, curve))
    return SimpleNamespace(model=model, config=config, folder=folder, sparsity=sparsity)


def keys(model: nn.Module) -> dict[str, str]:
    return {unit.name: unit.key for unit in profile.units(model)}


# --- the file


def test_choices_come_back_as_written():
    choices = {"a": Choice(0.5, ROWS), "b": Choice(1.0, ZIGZAG)}
    where = profile.write(choices, {"commit": "x"})
    assert where == profile.path()
    assert profile.read() == (choices, "")


def test_writing_again_keeps_other_units():
    profile.write({"a": Choice(0.5, ROWS), "b": Choice(0.5, ROWS)}, {})
    profile.write({"b": Choice(0.1, ZIGZAG)}, {})
    assert profile.read()[0] == {"a": Choice(0.5, ROWS), "b": Choice(0.1, ZIGZAG)}


def test_no_profile_changes_nothing():
    one = loaded()
    before = zigzag_layers(one.model)
    assert session.apply_profile(one) == ""
    assert zigzag_layers(one.model) == before


@pytest.mark.parametrize("part", ["chip", "mlx", "spqt", "backend"])
def test_another_device_or_version_has_a_profile_of_its_own(part, monkeypatch):
    profile.write({"a": Choice(0.5, ROWS)}, {})
    here = profile.device_key()
    monkeypatch.setattr(profile, "device_key", lambda: {**here, part: "another"})
    assert profile.read() == ({}, "")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2}', '{"format": 1, "device": {}, "units": {}}'],
)
def test_a_damaged_profile_is_ignored_aloud(text):
    profile.write({"a": Choice(0.5, ROWS)}, {})
    profile.path().write_text(text)
    choices, fault = profile.read()
    assert choices == {}
    assert "bench --kernel --write" in fault
    assert session.apply_profile(loaded()) == fault


@pytest.mark.parametrize(
    "entry", [{"sparse_below": 2, "otherwise": ZIGZAG}, {"sparse_below": 0.5, "otherwise": "fast"}, {}, 3]
)
def test_an_impossible_choice_is_ignored_aloud(entry):
    profile.write({"a": Choice(0.5, ROWS)}, {})
    document = json.loads(profile.path().read_text())
    document["units"]["a"] = entry
    profile.path().write_text(json.dumps(document))
    assert profile.read()[0] == {}
    assert profile.read()[1]


# --- units and choices


def test_every_layer_is_in_one_unit():
    one = loaded()
    paths = [path for unit in profile.units(one.model) for path in unit.layers]
    assert sorted(paths) == sorted(zigzag_layers(one.model))
    assert set(keys(one.model)) == {"q_proj+k_proj+v_proj", "gate_proj+up_proj", "o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("density", "below", "expected"),
    [(0.5, 0.6, SPARSE), (0.6, 0.6, ROWS), (0.7, 0.6, ROWS), (1.0, 1.0, ROWS), (0.0, 0.0, ROWS)],
)
def test_choice_at_a_density(density, below, expected):
    assert Choice(below, ROWS).at(density) == expected


def test_densities_come_from_the_layer_s_own_curve():
    one = loaded(sparsity=0.4)
    zigzag_layers(one.model)[PATHS[0]].set_threshold(1.5)  # the curve is 2 * sparsity
    zigzag_layers(one.model)[PATHS[1]].set_threshold(None)
    by_layer = {
        id(layer): density
        for layer, density in profile.expected_densities(one.model, one.folder.curves, one.sparsity)
    }
    layers = zigzag_layers(one.model)
    assert by_layer[id(layers[PATHS[0]])] == pytest.approx(0.25)
    assert by_layer[id(layers[PATHS[1]])] == 1.0
    assert by_layer[id(layers["model.layers.0.mlp.down_proj"])] == pytest.approx(0.6)


# --- following a profile


def test_sparse_layers_stay_as_they_are():
    one = loaded()
    profile.write({key: Choice(0.61, ROWS) for key in keys(one.model).values()}, {})
    before = {path: (layer, layer.threshold) for path, layer in zigzag_layers(one.model).items()}
    assert session.apply_profile(one) == "profile of this device: 14 sparse layers"
    after = {path: (layer, layer.threshold) for path, layer in zigzag_layers(one.model).items()}
    assert after == before


def test_dense_zigzag_layers_lose_their_threshold():
    one = loaded()
    profile.write({keys(one.model)["gate_proj+up_proj"]: Choice(0.2, ZIGZAG)}, {})
    assert session.apply_profile(one) == "profile of this device: 4 zigzag layers"
    layers = zigzag_layers(one.model)
    dense = {path for path, layer in layers.items() if layer.threshold is None}
    assert len(layers) == 14
    assert dense == {f"model.layers.{at}.mlp.{name}_proj" for at in (0, 1) for name in ("gate", "up")}


def test_row_grouped_layers_are_repacked_with_cost_and_error_stated():
    one = loaded()
    exact = {path: layer.dequantized() for path, layer in zigzag_layers(one.model).items()}
    profile.write({keys(one.model)["gate_proj+up_proj"]: Choice(0.2, ROWS)}, {})
    said = session.apply_profile(one)
    assert said.startswith("profile of this device: 4 row-grouped layers; repacking took")
    assert "relative error of the weights" in said
    for path in PATHS:
        layer = dict(one.model.named_modules())[path]
        assert type(layer) is nn.QuantizedLinear
        x = mx.random.normal((1, 1, 64))
        error = mx.linalg.norm(layer(x) - x @ exact[path].T) / mx.linalg.norm(x @ exact[path].T)
        assert error.item() < 0.2  # a second 4-bit rounding: about 8 %
    assert len(zigzag_layers(one.model)) == 10
    assert one.model(mx.array([[3, 4]])).shape == (1, 2, 512)


def test_a_layer_that_stock_can_t_hold_runs_zigzag_dense():
    one = loaded(group_size=64)  # down_proj has 160 inputs
    profile.write({keys(one.model)["down_proj"]: Choice(0.2, ROWS)}, {})
    assert session.apply_profile(one) == "profile of this device: 2 zigzag layers"
    assert zigzag_layers(one.model)["model.layers.0.mlp.down_proj"].threshold is None


def test_repacking_states_the_true_error():
    layer = ZigzagLinear.from_linear(nn.Linear(64, 96, bias=True), 32, 4)
    stock, error = relayout.row_grouped(layer)
    back = mx.dequantize(stock.weight, stock.scales, stock.biases, 32, 4)
    exact = layer.dequantized()
    expected = (((back - exact) ** 2).sum() / (exact**2).sum()) ** 0.5
    assert error == pytest.approx(expected.item(), rel=1e-3)
    assert mx.array_equal(stock.bias, layer.bias)


# --- heads


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False)])
def test_a_head_moves_to_zigzag_when_the_profile_says_so(arch, tied):
    one = loaded(arch)
    x = mx.random.normal((1, 1, 64), key=mx.random.key(5))
    ids = mx.array([[1, 2, 3]])
    head = relayout.find_head(one.model)
    assert head.tied is tied
    before = head.module.as_linear(x) if tied else one.model.lm_head(x)
    rows = one.model.model.embed_tokens(ids)
    profile.write({head.key: Choice(0.0, ZIGZAG)}, {})
    said = session.apply_profile(one)
    assert said.startswith("profile of this device: no layers; head in Zigzag")
    after = one.model.model.embed_tokens.as_linear(x) if tied else one.model.lm_head(x)
    error = mx.linalg.norm(after - before) / mx.linalg.norm(before)
    assert 0 < error.item() < 0.2  # a second 4-bit rounding: about 8 %
    assert mx.array_equal(one.model.model.embed_tokens(ids), rows)
    assert len(zigzag_layers(one.model)) == 14  # a head is never sparse, so it is none of them
    assert one.model(ids).shape == (1, 3, 512)


def test_an_embedding_with_its_own_head_is_not_read_whole():
    one = loaded("llama")
    before, _ = session.weight_bytes(one.model, one.config)
    profile.write({relayout.find_head(one.model).key: Choice(0.0, ZIGZAG)}, {})
    session.apply_profile(one)
    after, _ = session.weight_bytes(one.model, one.config)
    embedding = one.model.model.embed_tokens
    row = sum(embedding[name].nbytes for name in ("weight", "scales", "biases")) / 512
    assert after == before + row  # the same number of bytes in the other layout, the band being full


def test_a_head_stays_where_stock_is_faster():
    one = loaded()
    head = relayout.find_head(one.model)
    profile.write({head.key: Choice(0.0, ROWS)}, {})
    assert session.apply_profile(one) == ""
    assert relayout.find_head(one.model).module is head.module


def test_an_unquantized_head_is_none():
    config = tiny_config("qwen2")
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    assert relayout.find_head(model_class(args_class.from_dict(config))) is None


# --- converting by a profile


def sized(path: str, outputs: int = 64, inputs: int = 64, group_size: int = 32) -> dict[str, profile.Size]:
    return {f"model.layers.0.{path}": profile.Size(outputs, inputs, 4, group_size)}


def test_layers_are_chosen_by_unit_and_density():
    layers = sized("mlp.gate_proj") | sized("mlp.up_proj") | sized("mlp.down_proj", 64, 96)
    profile.write(
        {"64x64+64x64 4 bits group 32": Choice(0.5, ROWS), "64x96 4 bits group 32": Choice(1.0, ROWS)}, {}
    )
    pair = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert profile.better_as_rows(layers, 0.6) == pair
    assert profile.better_as_rows(layers, 0.4) == []


def test_layers_that_mlx_can_not_hold_stay_zigzag():
    profile.write({"64x80 4 bits group 32": Choice(0.0, ROWS)}, {})
    assert profile.better_as_rows(sized("self_attn.o_proj", 64, 80), 1.0) == []


def test_layers_of_blocks_that_run_fused_on_a_gpu_stay_as_they_are(monkeypatch):
    one = loaded()
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    staying = profile.traced_blocks(one.model)
    assert sorted(staying) == ["model.layers.0", "model.layers.1"]
    layers = sized("self_attn.o_proj") | {"other.o_proj": profile.Size(64, 64, 4, 32)}
    profile.write({"64x64 4 bits group 32": Choice(0.0, ROWS)}, {})
    assert profile.better_as_rows(layers, 1.0, staying) == ["other.o_proj"]
    before = list(zigzag_layers(one.model))
    for other in (ZIGZAG, ROWS):
        profile.write({unit.key: Choice(0.0, other) for unit in profile.units(one.model)}, {})
        session.apply_profile(one)
        assert list(zigzag_layers(one.model)) == before
        assert all(layer.threshold is not None for layer in zigzag_layers(one.model).values())
    monkeypatch.setattr(select, "backend", lambda: DEFINITION)
    profile.write({unit.key: Choice(0.0, ROWS) for unit in profile.units(one.model)}, {})
    session.apply_profile(one)
    assert len(zigzag_layers(one.model)) < len(before)


def test_without_a_profile_there_is_nothing_to_follow():
    with pytest.raises(UsageError, match="no profile"):
        profile.better_as_rows(sized("mlp.down_proj"), 0.5)


def test_convert_stores_row_grouped_what_the_profile_says(tmp_path, checkpoint):
    source = checkpoint
    whole = convert.convert(str(source), tmp_path / "whole", convert.ConvertOptions(group_size=32))
    loaded_units = profile.units(session.load(tmp_path / "whole").model)
    slow = next(unit for unit in loaded_units if unit.name == "down_proj")
    profile.write({slow.key: Choice(0.0, ROWS)}, {})
    options = convert.ConvertOptions(group_size=32, profile=0.25)
    dry = convert.convert(str(source), tmp_path / "no", dataclasses.replace(options, dry_run=True))
    assert dry.layers == whole.layers - sum(unit.name == "down_proj" for unit in loaded_units)
    convert.convert(str(source), tmp_path / "mixed", options)
    mixed = session.load(tmp_path / "mixed").model
    down = [layer for path, layer in mixed.named_modules() if path.endswith("down_proj")]
    assert down
    assert all(type(layer) is nn.QuantizedLinear for layer in down)
    everything = zigzag_layers(session.load(tmp_path / "whole").model)
    assert zigzag_layers(mixed).keys() == {path for path in everything if "down" not in path}


def test_a_share_out_of_range_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--profile 1"):
        convert.convert("x", tmp_path / "y", convert.ConvertOptions(profile=1.0))
