"""What a token reads: chosen experts, one row of an embedding, a tied head whole; why modules stay out."""

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors import safe_open

from spqt_cli.cli import describe
from spqt_cli.convert import convert, plan
from spqt_cli.decode import bytes_read, session
from spqt_cli.decode.bytes_read import Fractions
from tests.cli.test_commands import spqt
from tests.conftest import SIZES, tiny_checkpoint
from tests.lib.mixture import tiny_mixture


class Mixture(nn.Module):
    """Experts, and settings wherever an architecture may keep them."""

    def __init__(self, total: int = 8, **settings: Any) -> None:
        super().__init__()
        self.experts = SwitchLinear(32, 64, total)
        for name, value in settings.items():
            setattr(self, name, value)


def fractions(mixture: nn.Module, config: dict[str, Any] | None = None) -> tuple[float, str]:
    network = nn.Module()
    network.layers = [nn.Module()]
    network.layers[0].mlp = mixture
    found = Fractions(dict(network.named_modules()), config or {})
    return found.of("layers.0.mlp.experts"), found.experts


def test_groups_of_attention_are_all_read():
    network = nn.Module()
    network.layers = [nn.Module()]
    network.layers[0].mlp = Mixture(num_experts_per_tok=2)
    network.layers[0].self_attn = nn.Module()
    network.layers[0].self_attn.o_a_proj = SwitchLinear(32, 64, 8)
    found = Fractions(dict(network.named_modules()), {})
    assert found.of("layers.0.mlp.experts") == 0.25
    assert found.of("layers.0.self_attn.o_a_proj") == 1.0
    assert found.experts == "2 of 8 experts"


class Gate(nn.Module):
    top_k: int

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2


@pytest.mark.parametrize(
    "settings",
    [{name: 2} for name in bytes_read.CHOSEN_BY_MODULE]
    + [
        {"args": SimpleNamespace(num_experts_per_token=2)},
        {"config": {"moe_topk": [2, 2]}},
        {"gate": Gate()},
    ],
)
def test_the_number_of_chosen_experts_is_found_where_modules_keep_it(settings):
    assert fractions(Mixture(**settings)) == (0.25, "2 of 8 experts")


@pytest.mark.parametrize(
    "config", [{"moe_k": 2}, {"text_config": {"num_experts_per_tok": 2}}, {"ffn_config": {"moe_top_k": 2}}]
)
def test_else_the_config_has_it(config):
    assert fractions(Mixture(), config) == (0.25, "2 of 8 experts")


@pytest.mark.parametrize(
    "config", [{}, {"top_k": 2}, {"num_experts_per_tok": 9}, {"moe_k": True}, {"moe_k": None}, {"moe_k": "2"}]
)
def test_what_is_unknown_is_said_and_counted_whole(config):
    """A sampler's top_k, and numbers that make no sense, are none."""
    assert fractions(Mixture(), config) == (1.0, "experts per token unknown: all are counted")


def test_arrays_in_a_list_belong_to_the_module_around():
    """Some of mlx-lm's modules keep their matrices so."""
    holder = Mixture(top_k=2)
    holder.matrices = [mx.zeros((4, 4))]
    network = nn.Module()
    network.layers = [holder]
    decide = plan.Decisions(network, plan.Wishes())
    unit = decide.unit("layers.0.matrices.0", holder.matrices[0], None, None)
    assert (unit.reason, unit.read) == ("0 of a Mixture", 1.0)


def written(folder) -> dict[str, int]:
    """Path of a module -> bytes of its arrays in a converted folder."""
    sizes: dict[str, int] = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                size = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2}[part.get_dtype()]
                for length in part.get_shape():
                    size *= length
                path = name.rpartition(".")[0]
                sizes[path] = sizes.get(path, 0) + size
    return sizes


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(the converted folder of a mixture of experts, what convert said)."""
    folder = tmp_path_factory.mktemp("mixture")
    source = tiny_mixture(folder / "source")
    result = convert.convert(str(source), folder / "out", convert.ConvertOptions(group_size=32, sparsity=0.5))
    return folder / "out", result


def test_a_mixture_reads_its_chosen_experts_alone(mixture):
    folder, result = mixture
    sizes = written(folder)
    assert result.reads.experts == "2 of 4 experts"
    chosen = sum(size for path, size in sizes.items() if "switch_mlp" in path) / 2
    row = sizes["model.embed_tokens"] / SIZES["vocab_size"]
    rest = sum(size for path, size in sizes.items() if "switch_mlp" not in path and "embed" not in path)
    entries = json.loads((folder / "config.json").read_text())["quantization"]
    listed = [path for path, entry in entries.items() if isinstance(entry, dict) and "spqt" in entry]
    zigzag = sum(sizes[path] / (2 if "switch_mlp" in path else 1) for path in listed)
    assert any("switch_mlp" in path for path in listed)
    total = chosen + row + rest
    assert result.reads.bytes == pytest.approx(total)
    assert result.reads.skippable == pytest.approx(zigzag / total)
    assert result.reads.gain == pytest.approx(1 / (1 - 0.5 * zigzag / total))
    left = sum(one.bytes for one in result.reads.left_out)
    assert left == pytest.approx(total - zigzag)
    assert sum(one.share for one in result.reads.left_out) == pytest.approx(1 - zigzag / total)


def test_every_kind_of_module_that_stays_out_is_told_with_its_reason(mixture):
    _, result = mixture
    reasons = {one.modules: (one.count, one.reason) for one in result.reads.left_out}
    assert not any("switch_mlp" in name for name in reasons)
    assert reasons["model.layers.*.mlp.gate"] == (1, "chooses among experts")
    assert reasons["lm_head"] == (1, "the head is read whole")
    assert reasons["model.embed_tokens"] == (1, "one row is looked up")
    assert reasons["norms, biases and the like"][1] == "no matrices"
    assert "always read:" in result.summary()
    assert "experts stay row-grouped" not in result.summary()
    assert "at 50% sparsity (the preset's)" in result.summary()


def test_inspect_says_what_convert_said(mixture):
    folder, result = mixture
    seen = describe.describe(str(folder)).reads
    assert seen.bytes == pytest.approx(result.reads.bytes)
    assert seen.skippable == pytest.approx(result.reads.skippable)
    assert [one.line() for one in seen.left_out] == [one.line() for one in result.reads.left_out]
    assert seen.origin == "not calibrated yet: the default for this size"
    assert seen.sparsity == 0.25
    told = json.loads(spqt("inspect", folder, "--json").stdout)["reads"]
    assert told["left_out"][0]["reason"]
    assert told["gain"] == pytest.approx(1 / (1 - 0.25 * seen.skippable))


def test_generate_counts_what_inspect_tells(mixture):
    folder, result = mixture
    loaded = session.load(folder)
    _, dense, _ = session.touched_bytes(loaded, [])
    on_disk = result.reads.bytes
    assert dense >= on_disk  # on a CPU what is not packed is kept in float32
    assert dense == pytest.approx(on_disk, rel=0.15)


def test_a_tied_head_is_read_whole_and_sparsity_is_the_calibrated_one(calibrated):
    seen = describe.describe(str(calibrated))
    sizes = written(calibrated)
    assert seen.reads.bytes == sum(sizes.values())
    (head,) = [one for one in seen.reads.left_out if one.modules == "model.embed_tokens"]
    assert head.bytes == sizes["model.embed_tokens"]
    assert head.reason == "the head too, read whole"
    assert (seen.reads.sparsity, seen.reads.origin) == (0.4, "calibrated")
    assert "at 40% sparsity (calibrated) decoding is at most" in seen.text()


def test_layers_that_a_preset_keeps_are_told_as_such(checkpoint, tmp_path):
    options = convert.ConvertOptions(group_size=32, skip=("down_proj",))
    result = convert.convert(str(checkpoint), tmp_path / "out", options)
    for told in (result.reads, describe.describe(str(tmp_path / "out")).reads):
        (kept,) = [one for one in told.left_out if "down_proj" in one.modules]
        assert (kept.modules, kept.count) == ("model.layers.*.mlp.down_proj", 2)
        assert "preset" in kept.reason


def test_narrow_layers_have_a_reason_of_their_own(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", num_key_value_heads=1, head_dim=16)
    result = convert.convert(
        str(source), tmp_path / "out", convert.ConvertOptions(group_size=32, dry_run=True)
    )
    reasons = {one.modules: one.reason for one in result.reads.left_out}
    assert reasons["model.layers.*.self_attn.k_proj"] == "narrower than a group of 32"
