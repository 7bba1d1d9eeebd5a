"""`spqt adapter`: a LoRA or DoRA adapter of Hugging Face's PEFT as mlx-lm and spqt read it.

The two differ in names, in which matrix is transposed, and in how the scale is written. It reads headers and
numbers of the adapter alone; whether it fits a model is seen when it is put on one.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from safetensors.numpy import save

from spqt_cli.decode import adapter_folder
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files
from spqt_cli.system import files

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
LARGEST = 1e30
PLAIN = re.compile(r"[\w.]+")
# Settings that change what an adapter computes, and that mlx-lm's adapters have nothing for.
UNKNOWN = ("megatron_config", "layer_replication", "trainable_token_indices", "target_parameters",
           "alora_invocation_tokens", "lora_bias", "use_qalora", "arrow_config")  # fmt: skip


@dataclass
class AdapterResult:
    """What was converted. kind: lora or dora; rank: the largest of its layers'."""

    output: Path
    kind: str
    layers: int
    rank: int

    def summary(self) -> str:
        """One line for people."""
        return f"{self.output}: {self.kind} adapter of {self.layers} layers, rank {self.rank}"


def convert(source: Path, output: Path) -> AdapterResult:
    """Write a PEFT adapter as mlx-lm's. Raises SpqtError for a damaged one, UnsupportedError for others."""
    source, output = files.expanded(source), files.expanded(output).absolute()
    config = _config(source)
    checkpoint_files.refuse_pipes(source)
    if not (source / WEIGHTS).is_file():
        checkpoint_files.refuse_no_weights(source)
    checkpoint_files.read_shard(source / WEIGHTS, WEIGHTS)
    layers = _layers(source, config, cast(dict[str, mx.array], mx.load(str(source / WEIGHTS))))
    files.check_target(output, source)
    with files.claim(output):
        files.check_target(output, source)
        work = files.new_work_folder(output)
        try:
            result = _write(work, output, config, layers)
            files.publish(work, output)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return result


def _write(work: Path, output: Path, config: dict[str, Any], layers: dict[str, "Layer"]) -> AdapterResult:
    rank = max(len(layer.down) for layer in layers.values())
    kind = "dora" if config.get("use_dora") else "lora"
    arrays: dict[str, np.ndarray] = {}
    for path, layer in layers.items():
        missing = rank - len(layer.down)  # ranks may differ: more rows of zeros add nothing
        arrays[f"{path}.lora_a"] = np.pad(layer.down.T, [(0, 0), (0, missing)])
        arrays[f"{path}.lora_b"] = np.pad(layer.up.T * np.float32(layer.scale), [(0, missing), (0, 0)])
        if layer.magnitude is not None:
            arrays[f"{path}.m"] = layer.magnitude.reshape(-1)
    settings = {
        "rank": rank,
        "scale": 1.0,
        "dropout": _number(config, "lora_dropout", 0.0),
        "keys": [*layers],
    }
    said = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": settings}
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"format": "mlx"})
    with files.disk_errors(work):
        (work / adapter_folder.WEIGHTS).write_bytes(data)
    files.write_text(work / adapter_folder.CONFIG, json.dumps(said, indent=1) + "\n")
    return AdapterResult(output, kind, len(layers), rank)


@dataclass
class Layer:
    """One layer's, float32. down: (rank, inputs); up: (outputs, rank); magnitude: (outputs,), DoRA's."""

    down: np.ndarray
    up: np.ndarray
    scale: float
    magnitude: np.ndarray | None


def _layers(source: Path, config: dict[str, Any], stored: Mapping[str, mx.array]) -> dict[str, Layer]:
    """Path of each adapted layer -> its adapter; every tensor of the file is in one."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in stored.items():
        path, end = _place(name)
        if not end:
            raise UnsupportedError(
                f"{source / WEIGHTS}: tensor {name} is no LoRA matrix of a linear layer",
                "merge such an adapter into its model with PEFT, and convert that",
            )
        parts.setdefault(path, {})[end] = np.array(array.astype(mx.float32))
    if not parts:
        raise SpqtError(f"{source / WEIGHTS} is empty", AGAIN)
    return {path: _layer(source, path, found, config) for path, found in sorted(parts.items())}


def _place(name: str) -> tuple[str, str]:
    """(path of the layer, which part) of a PEFT tensor; no part for what is none."""
    name = name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name
    end = next((end for end in (DOWN, UP, MAGNITUDE) if name.endswith(end)), "")
    return name.removesuffix(end).removeprefix(PREFIX), end


def _layer(source: Path, path: str, found: dict[str, np.ndarray], config: dict[str, Any]) -> Layer:
    down, up, magnitude = (found.get(end) for end in (DOWN, UP, MAGNITUDE))
    sound = down is not None and up is not None and bool(config.get("use_dora")) == (magnitude is not None)
    if not sound or down is None or up is None:
        raise SpqtError(f"{source / WEIGHTS}: layer {path} is incomplete", AGAIN)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.size:
        raise SpqtError(f"{source / WEIGHTS}: layer {path} has shapes {down.shape} and {up.shape}", AGAIN)
    if not all(np.isfinite(part).all() for part in found.values()):
        raise SpqtError(f"{source / WEIGHTS}: layer {path} holds NaN or infinity", AGAIN)
    rank = down.shape[0]
    alpha = _of_pattern(config, "alpha_pattern", path, _number(config, "lora_alpha", 8))
    return Layer(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)


def _config(source: Path) -> dict[str, Any]:
    """PEFT's settings, all of which are understood."""
    path = source / adapter_folder.CONFIG
    if not path.is_file():
        what = adapter_folder.lacking(source)
        raise SpqtError(what, "give the folder of a PEFT adapter" + files.near(source))
    config = checkpoint_files.read_json(path)
    kind = config.get("peft_type")
    if kind is None:
        raise SpqtError(f"{source} is no PEFT adapter", "an adapter of mlx-lm's own is used as it is")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: peft_type {kind!r}", "LoRA and DoRA can be converted")
    if used := [name for name in UNKNOWN if config.get(name)]:
        raise UnsupportedError(f"{path}: {used[0]} is set", "mlx-lm's adapters have nothing like it")
    return config


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not -LARGEST < value < LARGEST:  # or NaN
        raise SpqtError(f"{name} of the adapter is {value!r}, no number", AGAIN)
    return float(value)


def _of_pattern(config: dict[str, Any], name: str, path: str, default: float) -> float:
    """A layer's own setting, as PEFT looks it up: of the first key with which the path ends, in whole names.

    PEFT takes keys for regular expressions. Only plain ones are taken here: others' may run for ever.
    """
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or not all(PLAIN.fullmatch(key) for key in patterns):
        raise UnsupportedError(f"{name} of the adapter is {str(patterns)[:80]}", "names of layers are known")
    found = next((key for key in patterns if f".{path}".endswith(f".{key}")), None)
    return default if found is None else _number(patterns, found, default)
