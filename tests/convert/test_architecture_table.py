"""A dozen architectures of every kind against their definition, and the page that lists all."""

import mlx.core as mx
import pytest
from mlx import nn

from spqt_cli.convert import parameters
from spqt_cli.errors import UnsupportedError
from tests.convert import architectures
from tests.lib import architecture_configs
from tests.lib.architecture_check import RELATIVE, Row, examine

# Plain, keys shared, one token at a time, an expert a layer, exact zeros, latent attention, no gradients,
# stacked experts, linear attention, keys reused, one fused projection, recurrent blocks.
DOZEN = (
    "llama", "gemma3n", "mamba", "dbrx", "nemotron", "deepseek_v3", "deepseek_v41",
    "mixtral", "qwen3_next", "afm7", "gpt2", "recurrent_gemma",
)  # fmt: skip
NO_GRADIENTS = ("deepseek_v41",)  # recurrent_gemma's are finite on windows as short as these
FEW_FITTED = ("mamba", "dbrx")  # it has 8 layers; its experts see little text
UNREACHED = {"gemma3n": 4}  # k and v of the two layers that use another layer's
ZEROS = {"gemma3n": 2, "nemotron": 4}  # down projections behind top-k and behind ReLU squared


@pytest.mark.parametrize("name", DOZEN)
def test_architecture_is_as_its_definition(name, tmp_path):
    row = examine(name, tmp_path, window=32)
    assert row is not None
    assert not row.left_out
    assert row.dense <= RELATIVE
    assert row.sparse <= RELATIVE
    assert row.layers >= 4
    assert row.fitted >= (4 if name in FEW_FITTED else 10)
    assert row.gradients == (name not in NO_GRADIENTS)
    assert row.unreached == UNREACHED.get(name, 0)
    assert row.zeros >= ZEROS.get(name, 0)


def test_page_has_a_row_for_every_architecture():
    page = architectures.PAGE.read_text().partition(architectures.BEGIN)[2].partition(architectures.END)[0]
    listed = [line.split("|")[1].strip() for line in page.splitlines()[2:]]
    assert listed == sorted(listed)
    assert set(listed) <= set(architecture_configs.names())
    figures = [line for line in page.splitlines()[2:] if line.split("|")[-2].strip() == ""]
    assert len(figures) >= 121
    assert "**no**" not in page


def test_changed_row_is_told(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n" + architectures.BEGIN + architectures.END + "after\n")
    monkeypatch.setattr(architectures, "PAGE", page)
    rows = [Row("one", 80, 28, True, fitted=28), Row("two", left_out="needs a package")]
    assert architectures.write(architectures.lines(rows)) == 0
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert architectures.compare(architectures.lines(rows)) == 0
    rows[0].gradients = False
    assert architectures.compare(architectures.lines(rows)) == 1
    assert "uniform: no gradients" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        Row("one", dense=2 * RELATIVE, fitted=1),
        Row("one", sparse=1.0, fitted=1),
        Row("one"),
        Row("one", failed="x", fitted=1),
    ],
)
def test_wrong_row_is_wrong(row):
    assert not row.right


def test_a_vocabulary_without_the_tokens_that_a_class_forbids_is_refused():
    module = nn.Module()
    module._dummy_tokenizer_ids = mx.array([3, 7])
    parameters._check_vocabulary(module, {"model_type": "any", "vocab_size": 8}, "m")
    with pytest.raises(UnsupportedError, match="token 7"):
        parameters._check_vocabulary(module, {"model_type": "any", "vocab_size": 7}, "m")
