"""llama.cpp's own llama-bench as the peer of decode benchmarks, on a GPU or a CPU, one sample at a time.

It builds llama-bench from local sources, writes a GGUF of a shape with random Q4_0 weights, and runs it. All
tensors are Q4_0, head and embedding too, which is less to read than what llama-quantize makes of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.peer import BUILD, sources
from spqt_cli.bench.model_timing import Test

BLOCK, BLOCK_BYTES = 32, 18  # weights and bytes of a Q4_0 block: a float16 scale, then 16 bytes of codes
CODES_SPREAD = 4.6  # standard deviation of a random code less 8
PIECE_BLOCKS = 1 << 20  # blocks that are made once and repeated
ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYERS = {  # name of a block's tensor: sizes by name, outputs first
    "attn_q": ("q", "hidden"), "attn_k": ("kv", "hidden"), "attn_v": ("kv", "hidden"),
    "attn_output": ("hidden", "q"), "ffn_gate": ("inner", "hidden"), "ffn_up": ("inner", "hidden"),
    "ffn_down": ("hidden", "inner"),
}  # fmt: skip


class LlamaBench:
    """llama-bench and a model of a shape. name: for tables; note: what a reader must know of it."""

    name = "llama.cpp"

    def __init__(self, path: Path, config: dict[str, Any], folder: Path) -> None:
        self.on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self.program = build(sources(path))
        sizes = "-".join(str(config[key]) for key in ("model_type", "hidden_size", "num_hidden_layers"))
        self.model = folder / f"random-q4_0-{sizes}.gguf"
        if not self.model.exists():
            write(config, self.model)
        self.note = (
            f"llama.cpp {self._version()}: llama-bench, random Q4_0 in all tensors, its default settings"
        )
        if self.on_gpu:
            self.note += ", built without its flash attention kernels, which costs it speed at depth"

    def rate(self, test: Test) -> float:
        """Tokens per second of one sample; its program warms up before."""
        (row,) = self._run(*arguments(test))
        return float(row["avg_ts"])

    @property
    def weight_bytes(self) -> int:
        """Of the file, which is a little more than a token reads: the embedding is in it."""
        return self.model.stat().st_size

    def _run(self, *more: str) -> list[dict[str, Any]]:
        command = [str(self.program), "-m", str(self.model), "-r", "1", "-o", "json"]
        command += ["-ngl", "999" if self.on_gpu else "0", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"llama-bench failed: {done.stderr.strip()[-1000:]}")
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def _version(self) -> str:
        (row,) = self._run("-p", "1", "-n", "0", "--no-warmup")
        return f"{row.get('build_commit', '?')} ({row.get('backends', '?')})"


def arguments(test: Test) -> list[str]:
    """What makes llama-bench run a test."""
    tokens = ("0", str(test.tokens)) if test.decodes else (str(test.tokens), "0")
    return ["-p", tokens[0], "-n", tokens[1], "-d", str(test.depth)]


def build(folder: Path) -> Path:
    """The program, built for this machine's GPU where MLX has one of NVIDIA's, else for its CPU."""
    settings = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
    settings += [f"-DLLAMA_BUILD_{what}=OFF" for what in ("TESTS", "EXAMPLES", "SERVER")]
    settings += ["-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]
    kind = "cpu"
    if mx.cuda.is_available():
        info = mx.device_info()
        card = f"{info['compute_capability_major']}{info['compute_capability_minor']}"
        kind = f"cuda-{card}"
        settings += ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={card}", "-DGGML_CUDA_FA=OFF"]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    target, log = BUILD.parent / f"llama-bench-{kind}", BUILD.parent / "llama-bench.log"
    target.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        for command in (
            ["cmake", "-S", str(folder), "-B", str(target), *settings],
            ["cmake", "--build", str(target), "--target", "llama-bench", "-j", jobs],
        ):
            if subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode:
                sys.exit(f"llama-bench did not build: see {log}")
    return target / "bin" / "llama-bench"


def write(config: dict[str, Any], path: Path) -> None:
    """A GGUF of that config with random Q4_0 weights, written tensor by tensor: it may exceed memory."""
    import gguf

    if config["model_type"] not in ARCHITECTURES:
        sys.exit(f"no GGUF is made of a {config['model_type']}: give a shape of {', '.join(ARCHITECTURES)}")
    unfinished = path.with_suffix(".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(unfinished, config["model_type"])
    _metadata(writer, config)
    every = list(tensors(config))
    for name, shape in every:
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, shape in every:
        writer.write_tensor_data(_values(shape, random))
    writer.close()
    unfinished.replace(path)


def _metadata(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, outputs first, of what llama.cpp wants of such a model."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    sizes = {
        "hidden": hidden,
        "inner": config["intermediate_size"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "kv": config["num_key_value_heads"] * config["head_dim"],
    }
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", (vocabulary, hidden)
    for block in range(config["num_hidden_layers"]):
        yield f"blk.{block}.attn_norm.weight", (hidden,)
        yield f"blk.{block}.ffn_norm.weight", (hidden,)
        for name, (outputs, inputs) in LAYERS.items():
            yield f"blk.{block}.{name}.weight", (sizes[outputs], sizes[inputs])
            if config["model_type"] == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{block}.{name}.bias", (sizes[outputs],)
        if config["model_type"] == "qwen3":
            yield f"blk.{block}.attn_q_norm.weight", (config["head_dim"],)
            yield f"blk.{block}.attn_k_norm.weight", (config["head_dim"],)


def _values(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Ones for a vector, which is a norm or a bias; else blocks that leave the size of x about as it is."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    blocks = shape[0] * shape[1] // BLOCK
    few = random.integers(0, 256, (min(blocks, PIECE_BLOCKS), BLOCK_BYTES), np.uint8)
    few[:, :2] = np.array([1 / (CODES_SPREAD * shape[1] ** 0.5)], np.float16).view(np.uint8)
    return np.resize(few, (shape[0], shape[1] // BLOCK * BLOCK_BYTES))
