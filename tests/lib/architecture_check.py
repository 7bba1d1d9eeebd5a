"""One architecture of mlx-lm: made tiny, converted, calibrated, run, and held against its definition.

The definition: mlx-lm's class with plain float32 layers of the dequantized weights, whose inputs are masked
in decode steps by `layout.mask`. None of spqt's layers and kernels is in it.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import generate, hooks_cpu, layers, phase, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.fit import fit
from spqt_cli.format import config_json, contract, layout
from tests.conftest import write_tokenizer
from tests.lib import architecture_configs
from tests.lib.router_margins import margins

RELATIVE = 1e-4  # of the largest logit: float32 sums in another order, through four layers
PROMPT, STEPS = 40, 6  # tokens; the prompt is longer than the sliding windows of the tiny configs
ROUNDING = 2e-5  # relative difference of two sums of the same products, after some layers
STEPS_ROUNDING = 1e-6  # likewise, of the many values that afm7 rounds: no text keeps all farther from a half
ROUNDS = 16
Thresholds = Mapping[str, float | None]


@dataclass
class Row:
    """What became of one architecture. zigzag: share of the written bytes, percent. gradients: whether layers
    were priced by them. unreached: layers that the text never reached. zeros: layers with exact zeros among
    their inputs. dense, sparse: the largest difference from the definition, relative to the largest logit.
    fitted: layers that `--fit gptq` rounds for their inputs; at_once: with all blocks in memory.
    left_out: why it has no other figures; failed: what went wrong.
    """

    name: str
    zigzag: int = 0
    layers: int = 0
    gradients: bool = False
    unreached: int = 0
    zeros: int = 0
    dense: float = 0.0
    sparse: float = 0.0
    fitted: int = 0
    at_once: bool = False
    left_out: str = ""
    failed: str = ""

    def cells(self) -> list[str]:
        """The row as the page shows it: nothing that changes from machine to machine."""
        if why := self.failed or self.left_out:
            return [self.name, "", "", "", "", "", "", "", "", why]
        fits = ("yes" if found <= RELATIVE else "**no**" for found in (self.dense, self.sparse))
        method = "gradient, uniform" if self.gradients else "uniform: no gradients"
        counts = (str(count or "") for count in (self.unreached, self.zeros))
        fitted = f"{self.fitted}{', at once' * self.at_once}"
        return [self.name, str(self.layers), f"{self.zigzag} %", method, *counts, *fits, fitted, ""]

    @property
    def right(self) -> bool:
        if self.failed:
            return False
        return bool(self.left_out) or (self.fitted > 0 and max(self.dense, self.sparse) <= RELATIVE)


# Not to be had on every machine or not of this kind: reasons, and what they are told by.
REASONS = {
    "No Metal back-end": "needs a kernel that mlx-lm has for Metal alone",
    "can be stored in the Zigzag layout": "none of its blocks has a plain linear layer",
    "which spqt can't unpack": "its checkpoints are packed in a ternary form of their own",
    "Unsupported Hadamard pack": "its checkpoints are packed in a 2-bit form of their own",
}


def examine(name: str, folder: Path, window: int = 64) -> Row | None:
    """The row of an architecture; None for a module of mlx-lm that is none. window: tokens of each of 4."""
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except (SystemExit, ImportError):
        return Row(name, left_out="needs a package that mlx-lm doesn't require")
    if not hasattr(module, "Model") or not hasattr(module, "ModelArgs"):
        return None
    try:
        return _measured(name, folder, window)
    except Exception as error:
        for sign, reason in REASONS.items():
            if sign in f"{error}{error.__cause__}{getattr(error, 'cause', '')}":
                return Row(name, left_out=reason)
        raise


def _measured(name: str, folder: Path, window: int) -> Row:
    converted = folder / "converted"
    _write_source(name, folder / "source")
    result = convert.convert(str(folder / "source"), converted, convert.ConvertOptions(group_size=32))
    # All settings but the length of the text are the default ones.
    options = calibrate.CalibrateOptions(tokens=4 * window, window=window)
    found = calibrate.calibrate(converted, options, lambda *_: None)
    _generates(converted)
    names = {one.name for one in found.tried}
    row = Row(name, round(100 * result.zigzag_share), result.layers, "gradient" in names)
    row.unreached = sum(one.unreached for one in found.layers)
    row.zeros = sum(one.zeros > 0 for one in found.layers)
    thresholds = {
        path: entry["spqt"]["threshold"]
        for path, entry in contract.entries(config_json.read_config(converted)).items()
    }
    row.dense = _difference(converted, dict.fromkeys(thresholds))
    row.sparse = _difference(converted, thresholds)
    row.fitted, row.at_once = _fitted(folder, window)
    return row


def _fitted(folder: Path, window: int) -> tuple[int, bool]:
    """Of a model that is fitted and runs: layers that were, and whether all blocks were in memory."""
    output = folder / "fitted"
    options = fit.FitOptions(own=4, window=window)
    wishes = convert.ConvertOptions(group_size=32)
    found = fit.convert_fitted(str(folder / "source"), output, wishes, options, lambda *_: None)
    _generates(output)
    plainly = sum(int(note.split()[0]) for note in found.notes if "plainly rounded" in note)
    return found.layers - plainly, any("all were in memory" in note for note in found.notes)


def _write_source(name: str, source: Path) -> None:
    write_source(architecture_configs.config(name), source, seed=len(name))


def write_source(config: dict[str, Any], source: Path, seed: int) -> None:
    """A tiny checkpoint with seeded weights, named as mlx-lm names them."""
    source.mkdir(parents=True)
    config = {"torch_dtype": "float32", **config}
    (source / "config.json").write_text(json.dumps(config))
    weights = _weights(config, seed)
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(source)


def _weights(config: dict[str, Any], seed: int) -> dict[str, mx.array]:
    """Seeded weights of a model: matrices that keep a vector's length, scales around 1, small biases."""
    model_class, args_class = _get_classes(config)
    network = model_class(args_class.from_dict(config))
    draw = np.random.default_rng(seed)  # MLX's CPU build takes seconds for as many normals
    # Gemma 4 does not divide scores by the head's width: large norms would make attention a step function.
    largest = 1.0 if config["model_type"].startswith("gemma4") else 2.0
    weights = {}
    for name, value in tree_flatten(network.parameters()):
        if not mx.issubdtype(value.dtype, mx.floating):
            weights[name] = value
        elif "quant_" in name:  # what afm7 rounds its keys and values by: few of them lie at a half
            weights[name] = mx.full(value.shape, 0.5)
        elif "norm" in name and value.ndim < 2:
            weights[name] = mx.array(draw.uniform(0.2, largest, value.shape).astype(np.float32))
        else:
            scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.05
            weights[name] = mx.array(draw.standard_normal(value.shape, np.float32) * np.float32(scale))
    return weights


def _generates(folder: Path) -> None:
    """Let spqt write a few tokens, dense and sparse."""
    for dense in (True, False):
        loaded = session.load(folder, dense=dense)
        tokens = generate.encode(loaded, Prompt("pack my box with five dozen liquor jugs"))
        pieces = list(generate.stream(loaded, tokens, Sampling(), Options(max_tokens=4)))
        assert pieces[-1].generation_tokens > 0


class Masked(nn.Module):
    """The definition of a Zigzag layer: a plain one, of whose inputs a decode step sees the active ones.

    linear: an `nn.Linear`, or experts as a `SwitchLinear`, float32. threshold: None to skip nothing.
    """

    def __init__(self, linear: Any, threshold: float | None) -> None:
        super().__init__()
        self.linear = linear
        self._threshold = None if threshold is None else mx.array([threshold], mx.float32)
        self.gap = 1.0  # the smallest distance of an input from the threshold, relative to it

    def __call__(self, x: mx.array, *chosen: Any, **named: Any) -> mx.array:
        if self._threshold is not None and phase.decodes():
            if self._threshold.item() > 0:
                distance = mx.abs(mx.abs(x) - self._threshold) / self._threshold
                self.gap = min(self.gap, distance.min().item())
            x = layout.mask(x, self._threshold)
        return self.linear(x, *chosen, **named)


def _difference(folder: Path, thresholds: Thresholds) -> float:
    """The largest difference of a converted model's logits from its definition's, over the largest logit."""
    expected, thresholds, seed = _expected(folder, thresholds)
    loaded = session.load(folder, dense=True)
    for path, layer in layers.zigzag_layers(loaded.model).items():
        layer.set_threshold(thresholds[path])
    found = _logits(loaded.model, seed)
    allowed = expected > -np.inf  # phi3small forbids some tokens
    assert np.isfinite(expected[allowed]).all()
    assert np.array_equal(allowed, found > -np.inf)
    return float(np.abs(found - expected)[allowed].max() / np.abs(expected[allowed]).max())


def _expected(folder: Path, thresholds: Thresholds) -> tuple[np.ndarray, Thresholds, int]:
    """The definition's logits, the thresholds and the seed of a text on which nothing hangs on rounding.

    What lies within rounding of a step may fall to either side in another order of summation: a threshold
    so close to an input is moved a little, and a text on which a router's scores tie, or a value that is
    rounded lies at a half, is left for another.
    Both are seen in the definition alone.
    """
    seed = 0
    for _ in range(ROUNDS):
        definition = _definition(folder, thresholds)
        with _stock(), margins() as margin:
            found = _logits(definition, seed)
        modules = dict(definition.named_modules())
        close = {path for path in thresholds if modules[path].gap < ROUNDING}
        tied = margin.routers < ROUNDING or margin.steps < STEPS_ROUNDING
        if not close and not tied:
            return found, thresholds, seed
        seed += tied
        thresholds = {path: t and t * (1.001 if path in close else 1.0) for path, t in thresholds.items()}
    raise AssertionError(f"rounding decides: {sorted(close)}, {margin}")


def _definition(folder: Path, thresholds: Thresholds) -> nn.Module:
    """mlx-lm's class with dequantized weights, masked where a threshold is given."""
    config = config_json.read_config(folder)
    model_class, args_class = _get_classes(config)
    network: nn.Module = model_class(args_class.from_dict(config))
    modules = dict(network.named_modules())
    stored: dict[str, Any] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        stored |= dict(mx.load(str(shard)))
    for path in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        entry = config["quantization"].get(path) or config["quantization"]
        packed = [stored.pop(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        if path in thresholds:
            form = {"outputs": modules[path].weight.shape[-2], "bits": entry["bits"]}
            w = layout.dequantize(*packed, **form, group_size=entry["group_size"])
        else:
            w = mx.dequantize(*packed, group_size=entry["group_size"], bits=entry["bits"])
        stored[f"{path}.weight"] = w
    network.load_weights(list(stored.items()))
    network.eval()
    masked = [(path, Masked(modules[path], value)) for path, value in thresholds.items()]
    network.update_modules(tree_unflatten(masked))
    return network


@contextmanager
def _stock() -> Iterator[None]:
    """MLX's own functions in this block, not those that spqt puts behind their names."""
    hooks_cpu.remove()
    try:
        yield
    finally:
        hooks_cpu.install()


def _logits(network: Any, seed: int) -> np.ndarray:
    """The logits of a prompt and of the steps after it: (PROMPT + STEPS, vocab)."""
    tokens = np.random.default_rng(seed).integers(5, architecture_configs.VOCAB, (1, PROMPT + STEPS))
    cache = make_prompt_cache(network)
    found = [network(mx.array(tokens[:, :PROMPT]), cache=cache)]
    with phase.decoding():
        found += [
            network(mx.array(tokens[:, at : at + 1]), cache=cache) for at in range(PROMPT, PROMPT + STEPS)
        ]
    return np.concatenate([np.array(y.astype(mx.float32))[0] for y in found])
