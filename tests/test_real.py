"""The main job on the real small model that `make` fetches: GGUF in, text out.

Skipped where the model is not there, except in CI, where its absence is a failure.
"""

import os
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from tests.decode.test_generate import dequantized_copy

PROMPT = "Explain in a few sentences why the sky is blue."


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    path = os.environ.get("SPQT_REAL_GGUF", "")
    if not Path(path).is_file() and os.environ.get("CI"):
        pytest.fail("SPQT_REAL_GGUF names no file: make test fetches the model and sets it")
    if not Path(path).is_file():
        pytest.skip("set SPQT_REAL_GGUF, or run make test")
    return Path(path)


@pytest.fixture(scope="module")
def folder(gguf_path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("real") / "smollm2"
    result = convert.convert(str(gguf_path), output, convert.ConvertOptions(bits=4, group_size=32))
    assert result.zigzag_share > 0.5
    calibrate.calibrate(output, calibrate.CalibrateOptions(sparsity=0.25, tokens=512), lambda *_: None)
    return output


@pytest.mark.real
class TestRealModel:
    def test_dense_equals_stock_mlx_lm_token_for_token(self, folder):
        loaded = session.load(folder, dense=True)
        plain = dequantized_copy(loaded)
        tokens = generate.encode(loaded, Prompt(PROMPT))
        ours, stock = (
            [step.token for step in mlx_lm.stream_generate(each, loaded.tokenizer, tokens, max_tokens=64)]
            for each in (loaded.model, plain)
        )
        assert ours == stock
        assert len(ours) >= 32

    def test_it_answers_sparsely_and_sensibly(self, folder):
        loaded = session.load(folder)
        tokens = generate.encode(loaded, Prompt(PROMPT))
        *pieces, statistics = generate.stream(loaded, tokens, Sampling(), Options(max_tokens=48))
        text = "".join(pieces)
        assert "sky" in text.lower()
        assert 0.15 < statistics.sparsity < 0.35
        assert statistics.weight_bytes_per_token < 0.9 * statistics.dense_weight_bytes_per_token

    def test_the_file_of_weights_is_a_quarter_of_the_source_in_half_precision(self, folder):
        size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
        weights = mx.load(str(folder / "model.safetensors"))
        assert size < 0.35 * 2 * 134_515_008
        assert {value.dtype for value in weights.values()} <= {mx.uint32, mx.float16}
