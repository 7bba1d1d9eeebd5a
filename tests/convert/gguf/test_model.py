"""The reader on the real small model that `make` fetches, against the gguf package and known ids."""

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer

from spqt_cli.convert.gguf import checkpoint as gguf
from tests.lib.writing_gguf import STORED, load_tokenizer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def path() -> Path:
    found = Path(os.environ.get("SPQT_REAL_GGUF", ""))
    if not found.is_file() and os.environ.get("CI"):
        pytest.fail("SPQT_REAL_GGUF names no file: make test fetches the model and sets it")
    if not found.is_file():
        pytest.skip("set SPQT_REAL_GGUF, or run make test")
    return found


def stored_name(name: str) -> str:
    """The name in the file, by the tests' own table."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{STORED[module]}.{kind}"
    _, _, block, module = module.split(".", 3)
    return f"blk.{block}.{STORED[module]}.{kind}"


def test_tensors_hold_the_values_of_the_file(path: Path) -> None:
    """By what the gguf package unpacks, q and k with every second row of a head first; three blocks."""
    checkpoint = gguf.open_checkpoint(path)
    heads = {"q_proj": 9, "k_proj": 3}
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert {stored_name(name) for name in checkpoint.names()} == stored.keys()
    for name in checkpoint.names():
        if name.startswith("model.layers.") and name.split(".")[2] not in ("0", "14", "29"):
            continue
        tensor = stored[stored_name(name)]
        wanted = dequantize(tensor.data, tensor.tensor_type).reshape(checkpoint.shape(name))
        if count := heads.get(name.split(".")[-2]):
            starts = [64 * head + half for head in range(count) for half in (0, 1)]
            wanted = np.concatenate([wanted[first : first + 63 : 2] for first in starts])
        np.testing.assert_array_equal(checkpoint.read(name), wanted.astype(np.float16), err_msg=name)


def test_the_configuration_is_that_of_smollm2(path: Path) -> None:
    config = gguf.open_checkpoint(path).config
    wanted = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    assert {key: config[key] for key in wanted} == wanted


# Ids that the model's own tokenizer is known to give, digits and spaces among them.
KNOWN = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}


def test_ids_and_template_are_those_of_smollm2(path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(path, tmp_path)
    assert {text: tokenizer.encode(text) for text in KNOWN} == KNOWN
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_start|>x<|im_end|>")[::2] == [1, 2]
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 49152
