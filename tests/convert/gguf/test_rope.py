"""The rotary embedding's scaling in a .gguf file reaches the logits, whichever way the file states it."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter, RopeScalingType

from spqt_cli.convert.gguf import checkpoint as gguf
from spqt_cli.errors import UnsupportedError
from tests.convert.gguf.test_checkpoint import assert_equal, hf_model, logits, read_all, written


def _llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """The converter's formula, frequency by frequency."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_factors_are_recognized(tmp_path: Path) -> None:
    kind = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config, weights = hf_model("llama", rope_theta=500000.0, rope_scaling=kind, head_dim=64)
    factors = _llama3_factors(500000.0, 64, 32.0)
    assert len(set(factors.tolist())) > 3  # some lie between: the smooth part is tested too
    path = written(tmp_path, "llama", config, weights, extra={"rope_freqs.weight": factors})
    assert_equal(path, config, weights)


def test_any_other_factors_are_honoured(tmp_path: Path) -> None:
    config, weights = hf_model("llama")
    factors = np.array([1, 1.5, 2, 2.5, 3, 5, 7, 9], np.float32)
    path = written(tmp_path, "llama", config, weights, extra={"rope_freqs.weight": factors})
    checkpoint = gguf.open_checkpoint(path)

    def divide_frequencies(model: Any) -> None:
        frequencies = mx.array(10000.0 ** (np.arange(0, 16, 2) / 16) * factors)
        for layer in model.layers:
            layer.self_attn.rope = lambda x, offset=0: mx.fast.rope(
                x, 16, traditional=False, base=None, scale=1.0, offset=offset, freqs=frequencies
            )

    wanted = logits(config, weights, divide_frequencies)
    # The frequencies come from float32 or float64 powers: 1e-7 relative, times positions up to 12.
    np.testing.assert_allclose(logits(checkpoint.config, read_all(checkpoint)), wanted, atol=1e-4)
    assert np.abs(wanted - logits(config, weights)).max() > 1e-2  # the factors matter


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    config, weights = hf_model("llama")
    path = written(tmp_path, "llama", config, weights, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert assert_equal(path, config, weights).config["rope_scaling"] is None


@pytest.mark.parametrize(("arch", "kind"), [("llama", "linear"), ("gemma3", "linear"), ("qwen2", "yarn")])
def test_named_scaling_is_honoured(tmp_path: Path, arch: str, kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
    config, weights = hf_model(arch, rope_scaling=scaling)

    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    assert_equal(written(tmp_path, arch, config, weights, keys=keys), config, weights)
    plain = {name: value for name, value in config.items() if name != "rope_scaling"}
    assert np.abs(logits(config, weights) - logits(plain, weights)).max() > 1e-3


def test_a_factor_without_a_kind_is_linear(tmp_path: Path) -> None:
    config, weights = hf_model("llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
    path = written(tmp_path, "llama", config, weights, keys=lambda w: w.add_rope_scaling_factor(2.0))
    assert_equal(path, config, weights)


def test_scaling_that_is_unknown_is_refused(tmp_path: Path) -> None:
    config, weights = hf_model("llama")

    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_factor(2.0)

    with pytest.raises(UnsupportedError, match="longrope"):
        gguf.open_checkpoint(written(tmp_path, "llama", config, weights, keys=keys))


@pytest.mark.parametrize(
    ("name", "value"),
    [("attn_factor", 2.0), ("yarn_ext_factor", 0.5), ("yarn_attn_factor", 0.7), ("yarn_log_multiplier", 0.1)],
)
def test_a_scaling_that_mlx_lm_has_no_word_for_is_refused(tmp_path: Path, name: str, value: float) -> None:
    config, weights = hf_model("llama")
    keys = {"keys": lambda w: w.add_float32(f"llama.rope.scaling.{name}", value)}
    with pytest.raises(UnsupportedError, match=name):
        gguf.open_checkpoint(written(tmp_path, "llama", config, weights, **keys))


def test_the_ends_of_yarn_are_honoured(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config, weights = hf_model("llama", rope_scaling=scaling | {"beta_fast": 8.0, "beta_slow": 2.0})

    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_yarn_beta_fast(8.0)
        writer.add_rope_scaling_yarn_beta_slow(2.0)

    assert_equal(written(tmp_path, "llama", config, weights, keys=keys), config, weights)
    assert np.abs(logits(config, weights) - logits(config | {"rope_scaling": scaling}, weights)).max() > 1e-4


def test_factors_and_a_kind_at_once_are_refused(tmp_path: Path) -> None:
    config, weights = hf_model("llama")
    extra = {"rope_freqs.weight": np.full(8, 2.0, np.float32)}
    how = {"extra": extra, "keys": lambda w: w.add_rope_scaling_factor(2.0)}
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        gguf.open_checkpoint(written(tmp_path, "llama", config, weights, **how))
