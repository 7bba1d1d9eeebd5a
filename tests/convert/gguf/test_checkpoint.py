"""A model read from a .gguf file gives the logits of the HF weights it was written from, bit for bit.

The weights are float16 to begin with. What the converter does to them (moving rows, adding 1 to a norm
of 0.2 to 2) is exact in the float32 that the file stores, so nothing may differ at all.
"""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from spqt_cli.convert.gguf import checkpoint as gguf
from spqt_cli.convert.gguf import values as gguf_values
from spqt_cli.errors import SpqtError, UnsupportedError
from tests.conftest import random_weights, tiny_config
from tests.lib.writing_gguf import interleave, write_file, write_model

TOKENS = mx.array([[5, 17, 300, 41, 8, 8, 99, 3, 250, 7, 61, 12]])
Weights = dict[str, np.ndarray]


def hf_model(arch: str, seed: int = 1, **changes: Any) -> tuple[dict[str, Any], Weights]:
    """A tiny HF configuration and its float16 weights by HF name."""
    config = tiny_config(arch, **changes)
    weights = random_weights(config, seed, mx.float16)
    return config, {name: np.array(value) for name, value in weights.items()}


def logits(config: dict[str, Any], weights: Weights, change: Callable = lambda model: None) -> np.ndarray:
    """Logits of mlx-lm's model in float32; `change` may alter the model before it runs."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    values = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    model.load_weights(list(model.sanitize(values).items()))
    change(model)
    return np.array(model(TOKENS))


def written(folder: Path, arch: str, config: dict[str, Any], weights: Weights, **how: Any) -> Path:
    return write_model(folder / "tiny.gguf", arch, config, weights, **how)


def read_all(checkpoint: gguf.GgufCheckpoint) -> Weights:
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_equal(path: Path, config: dict[str, Any], weights: Weights) -> gguf.GgufCheckpoint:
    """The file's tensors and logits are those of the HF model."""
    checkpoint = gguf.open_checkpoint(path)
    found = read_all(checkpoint)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert checkpoint.shape(name) == weight.shape
        assert found[name].dtype == np.float16
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    np.testing.assert_array_equal(logits(checkpoint.config, found), logits(config, weights))
    return checkpoint


MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gemma3", {}),
    ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 4, "sliding_window": 5}),
]


@pytest.mark.parametrize(("arch", "changes"), MODELS)
def test_logits_equal_those_of_the_original(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    config, weights = hf_model(arch, **changes)
    path = written(tmp_path, arch, config, weights)
    checkpoint = assert_equal(path, config, weights)
    assert checkpoint.dtype == checkpoint.config["torch_dtype"] == "float16"
    assert checkpoint.config["tie_word_embeddings"] == ("lm_head.weight" not in weights)
    assert checkpoint.config["eos_token_id"] == 2
    assert checkpoint.nbytes_source == 4 * sum(w.size for w in weights.values())


def test_the_stored_row_order_is_the_interleaved_rotation() -> None:
    """Rows moved as this test's writer moves them, under the interleaved rotation, give the same logits.

    The same sums in another order: float32 differs by about sqrt(terms) * 2**-24 of the size of 1, over
    two layers; 1e-4 leaves room.
    """
    config, weights = hf_model("llama")
    moved = dict(weights)
    for name, weight in weights.items():
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                moved[name] = interleave(weight, heads)
    found = logits(config | {"rope_traditional": True}, moved)
    np.testing.assert_allclose(found, logits(config, weights), atol=1e-4)


def test_missing_biases_are_zeros(tmp_path: Path) -> None:
    config, weights = hf_model("llama", attention_bias=True)
    for name in weights:
        if name.endswith("o_proj.bias"):
            weights[name] = np.zeros_like(weights[name])
    kept = {name: w for name, w in weights.items() if not name.endswith("o_proj.bias")}
    assert_equal(written(tmp_path, "llama", config, kept), config, weights)


def test_the_sliding_layers_may_be_listed(tmp_path: Path) -> None:
    config, weights = hf_model("gemma3", num_hidden_layers=4, sliding_window=5)
    path = written(tmp_path, "gemma3", config, weights, keys=_listed_layers([True, False, True, False]))
    assert_equal(path, config, weights)


def _listed_layers(sliding: list[bool]) -> Callable[[GGUFWriter], None]:
    def keys(writer: GGUFWriter) -> None:
        for data in writer.kv_data:
            data.pop("gemma3.attention.sliding_window_pattern", None)
        writer.add_sliding_window_pattern(sliding)

    return keys


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "F16"])
def test_packed_weights_are_unpacked_then_put_in_order(tmp_path: Path, kind: str) -> None:
    config, weights = hf_model("llama")
    of = GGMLQuantizationType[kind]
    checkpoint = gguf.open_checkpoint(written(tmp_path, "llama", config, weights, kind=of))
    name = "model.layers.1.self_attn.q_proj.weight"
    stored = interleave(weights[name].astype(np.float32), 4)
    unpacked = dequantize(quantize(stored, of), of).reshape(4, 8, 2, 64)
    wanted = unpacked.swapaxes(1, 2).reshape(64, 64).astype(np.float16)
    np.testing.assert_array_equal(checkpoint.read(name), wanted)


def test_a_tensor_is_unpacked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = hf_model("llama")
    path = written(tmp_path, "llama", config, weights)
    monkeypatch.setattr(gguf_values, "CHUNK_WEIGHTS", 64 * 7)  # 7 rows: no divisor of any tensor's
    assert_equal(path, config, weights)


def test_reading_takes_the_tensor_and_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of Python's and NumPy's memory: the result and a few pieces in float32, not the whole in it."""
    config, weights = hf_model("llama", vocab_size=16384)
    path = written(tmp_path, "llama", config, weights, kind=GGMLQuantizationType.Q8_0)
    checkpoint = gguf.open_checkpoint(path)
    monkeypatch.setattr(gguf_values, "CHUNK_WEIGHTS", 1 << 15)
    tracemalloc.start()
    embedding = checkpoint.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert embedding.nbytes == 16384 * 64 * 2
    assert peak < embedding.nbytes + 6 * 4 * gguf_values.CHUNK_WEIGHTS


def test_bfloat16_files_stay_bfloat16(tmp_path: Path) -> None:
    config, weights = hf_model("qwen2")
    path = written(tmp_path, "qwen2", config, weights, kind=GGMLQuantizationType.BF16)
    checkpoint = gguf.open_checkpoint(path)
    assert checkpoint.dtype == checkpoint.config["torch_dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = np.array(mx.array(weights[name].astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))
    np.testing.assert_array_equal(checkpoint.read(name), wanted)


def test_a_weight_beyond_float16_makes_it_bfloat16(tmp_path: Path) -> None:
    config, weights = hf_model("llama")
    name = "model.layers.0.input_layernorm.weight"
    large = {key: w.astype(np.float32) for key, w in weights.items()}
    large[name][3] = 70000.0
    checkpoint = gguf.open_checkpoint(written(tmp_path, "llama", config, large))
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.read(name)[3] == 70000.0


@pytest.mark.parametrize("kind", sorted(gguf_values.BOUNDS))
def test_the_bound_of_a_packed_type_holds(kind: str) -> None:
    """Random blocks of every bounded type: no weight is larger than its block's scales allow."""
    from gguf import GGML_QUANT_SIZES

    of = GGMLQuantizationType[kind]
    blocks = np.random.default_rng(3).integers(0, 256, (4000, GGML_QUANT_SIZES[of][1]), np.uint8)
    bounds = gguf_values.block_bounds(blocks, gguf_values.BOUNDS[kind])
    finite = np.isfinite(bounds)  # the rest has a NaN or Inf for a scale
    largest = np.abs(dequantize(blocks[finite], of)).max(axis=1)
    assert finite.sum() > 3000
    assert np.all(largest <= bounds[finite] * (1 + 1e-6))  # both sums are rounded to float32


REFUSED_KEYS = [
    ("llama", "llama.expert_count", 8),
    ("llama", "llama.attention.sliding_window", 128),
    ("llama", "llama.attention.temperature_scale", 1),
    ("qwen2", "qwen2.attention.sliding_window", 128),
    ("qwen2", "qwen2.rope.dimension_count", 8),
    ("gemma3", "gemma3.final_logit_softcapping", 30),
    ("gemma3", "gemma3.attention.value_length", 8),
    ("llama", "clip.has_vision_encoder", 1),
    ("llama", "tokenizer.ggml.unheard_of", 1),
    ("llama", "general.quantization_version", 3),
]


@pytest.mark.parametrize(("arch", "key", "value"), REFUSED_KEYS)
def test_a_key_that_changes_results_is_refused(tmp_path: Path, arch: str, key: str, value: int) -> None:
    config, weights = hf_model(arch)

    def keys(writer: GGUFWriter) -> None:
        for data in writer.kv_data:
            data.pop(key, None)
        writer.add_uint32(key, value)

    path = written(tmp_path, arch, config, weights, keys=keys)
    with pytest.raises(UnsupportedError, match=key.split(".", 1)[1].replace(".", r"\.")) as caught:
        gguf.open_checkpoint(path)
    assert str(path) in caught.value.cause


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("qwen2", "rope_freqs.weight"),
        ("qwen2", "blk.0.attn_output.bias"),
        ("llama", "blk.0.ffn_gate_inp.weight"),
        ("llama", "rope_factors_long.weight"),
        ("gemma3", "blk.1.attn_q.bias"),
        ("gemma3", "mm.0.weight"),
    ],
)
def test_a_tensor_without_a_use_is_refused(tmp_path: Path, arch: str, name: str) -> None:
    config, weights = hf_model(arch)
    path = written(tmp_path, arch, config, weights, extra={name: np.ones(8, np.float32)})
    with pytest.raises(UnsupportedError, match=name.replace(".", r"\.")):
        gguf.open_checkpoint(path)


@pytest.mark.parametrize("arch", ["mistral3", "qwen3", "gemma2", "llama4", "clip"])
def test_another_architecture_is_refused_by_name(tmp_path: Path, arch: str) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", arch)
    writer.add_tensor("x", np.zeros(4, np.float32))
    with pytest.raises(UnsupportedError, match=repr(arch)) as caught:
        gguf.open_checkpoint(write_file(writer, tmp_path / "other.gguf"))
    assert caught.value.exit_code == 4


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config, weights = hf_model("llama")
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(SpqtError, match=r"lacks tensors: blk\.1\.ffn_down\.weight"):
        gguf.open_checkpoint(written(tmp_path, "llama", config, weights))


def test_a_shape_against_the_metadata_is_named(tmp_path: Path) -> None:
    config, weights = hf_model("llama")
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 64), np.float16)
    with pytest.raises(SpqtError, match=r"blk\.0\.ffn_up\.weight has the shape \(96, 64\)"):
        gguf.open_checkpoint(written(tmp_path, "llama", config, weights))
