"""Tiny seeded models for tests: an HF checkpoint with a tokenizer, and the same converted."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

# Memory that CPU kernels work in or write to is NaN beforehand, in child processes as well: cpu/scratch.h
os.environ["SPQT_POISON"] = "1"

VOCAB = 512
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,  # no multiple of 64: its band is padded
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
    },
}
LONGEST = ("test_packaging", "test_torture")
OF_HEADS = ("test_dense", "test_batches")  # multiply by matrices in MLX's own layout


def tiny_config(arch: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model of that architecture."""
    return {**SIZES, **ARCHITECTURES[arch], **changes}


def layer_settings(**changes: Any) -> dict[str, Any]:
    """What mlx-lm's llama-like classes need to build one block: 6 heads, 2 of keys."""
    settings = {
        "model_type": "any", "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 1e4, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return settings | changes


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB entries, trained on a few lines, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_weights(config: dict[str, Any], seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Seeded weights of a model, named as in its checkpoint; a few input channels stand out."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(seed)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        if "norm" in name:
            weights[name] = mx.random.uniform(0.2, 2.0, value.shape).astype(dtype)
        else:
            scale = 0.05 if name.endswith("bias") else value.shape[-1] ** -0.5
            weights[name] = (mx.random.normal(value.shape) * scale).astype(dtype)
    return weights


def tiny_checkpoint(
    folder: Path, arch: str = "llama", seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: Any
) -> Path:
    """Write a tiny HF checkpoint into `folder` (made if missing) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(arch, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, seed, dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_developer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A profile or verdict from this machine's own cache must not leak into tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def decode_steps() -> Iterator[None]:
    """All that the test feeds to layers were generated tokens."""
    from spqt_cli.decode import phase

    with phase.decoding():
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama checkpoint, shared: don't write to it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint converted (4 bits, group 32), not calibrated; shared: don't write to it."""
    from spqt_cli.convert import convert

    output = tmp_path_factory.mktemp("converted") / "tiny-llama-spqt"
    convert.convert(str(checkpoint), output, convert.ConvertOptions(bits=4, group_size=32))
    return output


@pytest.fixture(scope="session")
def calibrated(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model with thresholds for 40 %; shared: don't write to it."""
    import shutil

    from spqt_cli.calibrate import calibrate

    output = tmp_path_factory.mktemp("calibrated") / "tiny-llama-spqt"
    shutil.copytree(converted, output)
    calibrate.calibrate(output, calibrate.CalibrateOptions(sparsity=0.4, tokens=1024), lambda *_: None)
    return output


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a run share the kernels that the emulator compiles."""
    if not os.environ.get("SPQT_EMULATOR_CACHE"):
        folder = tempfile.TemporaryDirectory(prefix="spqt-emulator-")
        os.environ["SPQT_EMULATOR_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest go first, so that one worker gets them all and makes the real model once."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None and item.path.stem not in LONGEST)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that name `isa` run with each instruction set that this machine can execute."""
    if "isa" in metafunc.fixturenames:
        from spqt_cli.backends import cpu

        sets = cpu.isas()
        if "avx512vnni" in sets and metafunc.module.__name__.rpartition(".")[2] not in OF_HEADS:
            sets.remove("avx512")  # the same kernels, but for heads
        metafunc.parametrize("isa", sets, indirect=True)


@pytest.fixture(scope="session")
def clang() -> str:
    """A clang, for what is counted in its output; where CI says so (CI=true) a missing one fails."""
    from tests.metal.count_instructions import clang_path

    found = clang_path()
    if found is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("no clang (Debian's package is clang-14)")
    return found


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU extension with one instruction set."""
    from spqt_cli.backends import cpu

    native = cpu._native()
    before = native.isa()
    assert native.use_isa(request.param)
    yield request.param
    native.use_isa(before)
