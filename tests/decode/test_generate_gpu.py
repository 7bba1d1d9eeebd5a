"""Whole models on the GPU kernels under emulation: greedy tokens and shares of active channels as defined."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from spqt_cli.backends import select
from spqt_cli.backends.gpu import ways
from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import active_counts, session
from tests.backends.gpu.test_kernels import emulated, kinds
from tests.conftest import tiny_checkpoint
from tests.decode.test_fused_mlp import on_emulator
from tests.lib.backends import DEFINITION

__all__ = ["emulated", "on_emulator"]  # fixtures
PROMPT = mx.array([60, 70, 80, 90, 100])


def decoded(folder):
    """Tokens, and the mean share of active channels of every layer, counted in one step of four."""
    with active_counts.counting(4) as counter:
        steps = generate_step(PROMPT, session.load(folder).model, max_tokens=9)
        tokens = [int(token) for token, _ in steps]
    return tokens, sorted(share for _, share in counter.densities())


@pytest.mark.parametrize(("arch", "way"), [("llama", "few"), ("qwen2", "quantized"), ("gemma3", "quantized")])
def test_tokens_and_counts_are_the_definition_s(arch, way, tmp_path, monkeypatch, request):
    sizes = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}  # two stripes and more
    source = tiny_checkpoint(tmp_path / "source", arch, **sizes)
    folder = tmp_path / "model"
    convert.convert(str(source), folder, convert.ConvertOptions(bits=4, group_size=32))
    options = calibrate.CalibrateOptions(sparsity=0.4, tokens=512, method="uniform")
    calibrate.calibrate(folder, options, lambda *_: None)
    with monkeypatch.context() as definition:
        definition.setattr(select, "backend", lambda: DEFINITION)
        expected = decoded(folder)
    launches = request.getfixturevalue("on_emulator")
    monkeypatch.setattr(ways, "best", lambda *_: way)  # of the prompt
    assert decoded(folder) == expected
    assert set(kinds(launches)) == {"gemv", "reduce", "count"} | ({"rows"} if way == "few" else set())
