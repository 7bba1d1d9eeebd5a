"""Presets: shipped ones load, wrong ones say what is wrong."""

import pytest

from spqt_cli.cli import presets
from spqt_cli.errors import SpqtError, UsageError


def test_every_shipped_preset_loads():
    assert {"default", "small", "fast", "exact", "mixed"} <= set(presets.names())
    for name in presets.names():
        presets.load_preset(name)


def test_presets_leave_the_share_to_the_size_but_where_it_is_the_point():
    shares = {name: presets.load_preset(name).sparsity for name in presets.names()}
    assert {name: share for name, share in shares.items() if share is not None} == {
        "exact": 0.0,
        "fast": 0.5,
        "small": 0.25,
    }


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[quantization]\nbits = 5\n[calibration]\nsparsity = 0\n[layers]\nskip = ["k_proj"]\n')
    preset = presets.load_preset(str(path))
    assert (preset.bits, preset.sparsity, preset.skip) == (5, 0, ("k_proj",))
    assert preset.group_size is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[speed]\nfast = true\n", "speed"),
        ("[quantization]\nbit = 4\n", "bit"),
        ('[quantization]\nbits = "4"\n', "bits"),
        ("[quantization]\nbits = true\n", "bits"),
        ("[quantization\n", "mine.toml"),
        ("bits = 4\n", "bits"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, named):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SpqtError, match=named) as caught:
        presets.load_preset(str(path))
    assert caught.value.exit_code == 3


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(SpqtError) as caught:
        presets.load_preset("turbo")
    assert "default" in caught.value.hint
    assert caught.value.exit_code == 2
    with pytest.raises(SpqtError) as caught:
        presets.load_preset("no-such-file.toml")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "wrong", [{"bits": 7}, {"group_size": 16}, {"sparsity": 1.0}, {"sparsity": -0.1}, {"tokens": 0}]
)
def test_fault_27_values_out_of_range_are_usage_errors(wrong):
    with pytest.raises(UsageError) as caught:
        presets.merged(presets.Preset(), **wrong)
    assert caught.value.exit_code == 2


def test_flags_win_over_the_preset():
    merged = presets.merged(presets.load_preset("default"), bits=8, group_size=None)
    assert (merged.bits, merged.group_size) == (8, 64)
