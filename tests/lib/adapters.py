"""Adapters for tests: random ones written as mlx-lm writes them, and what they compute, written down."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from spqt_cli.decode import phase, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.format import layout
from tests.decode.test_generate import dequantized_copy

RANK, SCALE = 4, 3.0


def write(folder: Path, model: nn.Module, kind: str, keys: list[str] | None = None, **settings: Any) -> Path:
    """A folder with a random adapter for a model of plain layers, which gets it as well."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    wishes = {"num_layers": -1, **settings}
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0, **({"keys": keys} if keys else {})}
    mx.random.seed(11)
    model.freeze()
    linear_to_lora_layers(model, wishes["num_layers"], parameters, use_dora=kind == "dora")
    empty = dict(tree_flatten(model.trainable_parameters()))
    arrays = {name: _random(name, value) for name, value in empty.items()}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": kind, "lora_parameters": parameters, **wishes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model.load_weights(list(arrays.items()), strict=False)
    model.eval()
    return folder


def _random(name: str, value: mx.array) -> mx.array:
    if name.endswith(".m"):
        return value * mx.random.uniform(0.7, 1.3, value.shape)
    return mx.random.normal(value.shape) * 0.1


class Definition(nn.Module):
    """A dense layer with threshold and adapter, written down: the base is masked, the adapter is not."""

    def __init__(self, linear: nn.Linear, adapter: Any, threshold: mx.array | None) -> None:
        super().__init__()
        self.weight, self.bias, self.adapter = linear.weight, linear.get("bias"), adapter
        self._threshold = threshold

    def __call__(self, x: mx.array) -> mx.array:
        masked = self._threshold is not None and phase.decodes()
        y = (layout.mask(x, self._threshold) if masked else x) @ self.weight.T
        if self.adapter is not None:
            delta = (self.adapter.lora_a @ self.adapter.lora_b).T * self.adapter.scale
            y = y + x @ delta.T
            if "m" in self.adapter:
                y = y * (self.adapter.m / mx.linalg.norm(self.weight + delta, axis=1))
        return y if self.bias is None else y + self.bias


def define(plain: nn.Module, thresholds: dict[str, mx.array | None]) -> nn.Module:
    """A plain model, adapters on it or not, whose layers at these paths are `Definition`s from now on."""
    modules, places = dict(plain.named_modules()), []
    for path, threshold in thresholds.items():
        module: Any = modules[path]
        adapter = module if "lora_a" in module else None
        places.append((path, Definition(module if adapter is None else module.linear, adapter, threshold)))
    plain.update_modules(tree_unflatten(places))
    return plain


def pair(
    converted: Path, folder: Path, kind: str, keys: list[str] | None = None, **settings: Any
) -> tuple[session.Loaded, nn.Module]:
    """A converted model with an adapter that is written into `folder`, and the definition of both."""
    plain = dequantized_copy(session.load(converted, dense=True))
    write(folder, plain, kind, keys, **settings)
    loaded = session.load(converted, adapter_path=str(folder))
    thresholds = {path: layer.threshold for path, layer in zigzag_layers(loaded.model).items()}
    return loaded, define(plain, thresholds)
