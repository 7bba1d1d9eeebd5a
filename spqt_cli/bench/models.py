"""The models a benchmark compares: one in the Zigzag layout, and stock mlx-lm's with the same weights.

It builds them, brings caches to a depth and sets thresholds; it times nothing.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from spqt_cli.convert import plan
from spqt_cli.decode import architecture, exact, hooks, parallel
from spqt_cli.decode.layers import ZigzagLayer, zigzag_layers
from spqt_cli.errors import ResourceError, SpqtError
from spqt_cli.format import layout, locate
from spqt_cli.measure import many_rows, probes
from spqt_cli.system import heap

SEED = 0
CHUNK_TOKENS = 2048  # of an untimed pass: mlx-lm's own step


@dataclass
class Subject:
    """What is measured. tokens: of prompts, repeated as needed; settings: shown in the report.

    thresholds(sparsity, cache, tokens): the threshold of each layer by path, for decoding `tokens`
    more tokens after what `cache` holds. processes: those that have a part of the models each.
    """

    name: str
    config: dict[str, Any]
    zigzag: nn.Module
    stock: nn.Module
    tokens: list[int]
    settings: dict[str, Any]
    thresholds: Callable[[float, list[Any], int], dict[str, mx.array]]
    processes: parallel.Processes | None = None

    def prompt(self, start: int, count: int) -> mx.array:
        """`count` tokens from position `start` of the endlessly repeated text: (count,) int32."""
        return mx.array([self.tokens[(start + at) % len(self.tokens)] for at in range(count)])


def stored_dtype(config: dict[str, Any], wish: str | None = None) -> mx.Dtype:
    """The dtype of a model's floating arrays as `spqt convert` would store them: the wish, or its own."""
    return getattr(mx, wish or config.get("torch_dtype") or "float16")


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype that a model computes in, as its norms tell; float32 on a CPU, see hooks.py."""
    return next(array.dtype for name, array in arrays(model).items() if "norm" in name)


def packing(model: nn.Module) -> dict[str, Any]:
    """Bits and group size of a model's first Zigzag layer, and the dtype it computes in."""
    first = next(iter(zigzag_layers(model).values()))
    computed_in = str(compute_dtype(model)).rpartition(".")[2]
    return {"bits": first.bits, "group_size": first.group_size, "computed_in": computed_in}


def arrays(model: nn.Module) -> dict[str, mx.array]:
    """Every array of a model by its name."""
    return dict(tree_flatten(model.parameters()))


def random_subject(
    name: str,
    config: dict[str, Any],
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    processes: parallel.Processes | None = None,
) -> Subject:
    """A model of that config with seeded random weights, made on the device layer by layer."""
    mx.random.seed(SEED)
    zigzag = random_model(config, bits, group_size, dtype, processes)
    check_memory(zigzag, name)
    evaluate(zigzag)
    text = mx.random.randint(0, config["vocab_size"], (4096,))
    tokens = [int(token) for token in np.array(text)]

    def thresholds(sparsity: float, cache: list[Any], count: int) -> dict[str, mx.array]:
        return fit_thresholds(zigzag, sparsity, text[:count], cache)

    settings = {
        "weights": "random",
        **packing(zigzag),
    }
    twin = stock_twin(zigzag, config, processes)
    return Subject(name, config, zigzag, twin, tokens, settings, thresholds, processes)


def loaded_subject(path: str, processes: parallel.Processes | None = None) -> Subject:
    """A converted and calibrated model; prompts are the shipped calibration text."""
    from spqt_cli.decode import session
    from spqt_cli.measure import texts

    loaded = session.load(path, dense=True, pipeline=None if processes is None else processes.pipeline)
    calibration = loaded.folder.calibration
    if calibration is None:
        raise SpqtError(f"{path} has no thresholds, so nothing would be skipped", f"spqt calibrate {path}")

    def stored(sparsity: float, cache: list[Any], count: int) -> dict[str, mx.array]:
        session.set_sparsity(loaded, sparsity)
        layers = zigzag_layers(loaded.model).items()
        return {name: one.threshold for name, one in layers if one.threshold is not None}

    tokens = texts.tokens(texts.read(None), loaded.tokenizer)
    settings = {**packing(loaded.model), "calibrated": calibration.sparsity}
    twin = stock_twin(loaded.model, loaded.config, processes)
    name = loaded.folder.path.name
    return Subject(name, loaded.config, loaded.model, twin, tokens, settings, stored, processes)


def lazy_model(path: str) -> nn.Module:
    """A converted model whose weights are not read yet."""
    from spqt_cli.decode import session

    return session.load_lazily(locate.open_folder(path)).model


def random_model(
    config: dict[str, Any],
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    processes: parallel.Processes | None = None,
) -> nn.Module:
    """mlx-lm's model of a config, its layers quantized as `spqt convert` would; nothing is evaluated.

    processes: keep this one's part alone; that evaluates it, layer by layer.
    """
    model, settings = _random(config, "zigzag", (bits, group_size, dtype))
    hooks.install()
    nn.quantize(model, class_predicate=settings)
    if processes is None:
        model.load_weights([], strict=False)  # as after a real load, so that hooks.py makes the model ready
        return model
    with hooks.cut_later():
        model.load_weights([], strict=False)
    _cut(model, config, processes)
    hooks.make_ready(model)
    return model


def random_stock(
    config: dict[str, Any],
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    processes: parallel.Processes | None = None,
) -> nn.Module:
    """Stock mlx-lm's model with other random weights of the same form, or this process's part; evaluated."""
    model, settings = _random(config, "affine", (bits, group_size, dtype))
    nn.quantize(model, class_predicate=settings)
    if processes is not None:
        _cut(model, config, processes)
    evaluate(model)
    return model


def _random(
    config: dict[str, Any], mode: str, form: tuple[int, int, mx.Dtype]
) -> tuple[nn.Module, Callable[..., Any]]:
    """A model with random weights, and how each of its layers is quantized: Zigzag ones by `mode`.

    form: bits, group size and the dtype of all other arrays.
    """
    model, (bits, group_size, dtype) = _build(config), form
    model.set_dtype(dtype)
    decisions = plan.Decisions(model, plan.Wishes(bits, group_size))
    kinds = {path: decisions.kind(path) for path in decisions.modules}  # it holds modules, this does not

    def settings(path: str, _: nn.Module) -> dict[str, Any] | bool:
        kind, layer_bits, layer_group = kinds[path]
        if kind == plan.PLAIN:
            return False
        of_layer = mode if kind == plan.ZIGZAG else "affine"
        return {"group_size": layer_group, "bits": layer_bits, "mode": of_layer}

    return model, settings


def _cut(model: nn.Module, config: dict[str, Any], processes: parallel.Processes) -> None:
    """Let a model of lazy arrays keep this process's part alone."""
    groups = (processes.group, None) if processes.pipeline else (None, processes.group)
    with parallel.sharding(*groups):
        parallel.prepare(model, config)
    cut: Any = model.model.pipeline if processes.pipeline else model.shard
    cut(processes.group)


def _build(config: dict[str, Any]) -> nn.Module:
    model_class, args_class = architecture.classes(config, str(config.get("model_type")))
    return model_class(args_class.from_dict(config))


def stock_twin(
    zigzag: nn.Module, config: dict[str, Any], processes: parallel.Processes | None = None
) -> nn.Module:
    """Stock mlx-lm's model with a Zigzag model's weights: dequantized, re-quantized row by row, evaluated.

    Bits, group and dtype are equal; all other arrays are shared. Where a layer's inputs are no multiple
    of the group, stock mlx-lm can't quantize it, so it stays a plain matrix. processes: cut as mlx-lm does.
    """
    twin = _build(config)
    dtype = compute_dtype(zigzag)
    weights: dict[str, mx.array] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path, module in zigzag.named_modules():
        if isinstance(module, ZigzagLayer):
            weights.update(_row_grouped(path, module, dtype))
        elif not isinstance(module, exact.ExactRoPE):  # the class's own turns otherwise, and costs the same
            weights.update({f"{path}.{key}": a for key, a in module.items() if isinstance(a, mx.array)})
        if f"{path}.scales" in weights:
            mode = "affine" if isinstance(module, ZigzagLayer) else module.mode
            settings[path] = {"group_size": module.group_size, "bits": module.bits, "mode": mode}
    nn.quantize(twin, class_predicate=lambda path, _: settings.get(path, False))
    if processes is not None:
        _cut(twin, config, processes)
        missing = {name: one for name, one in arrays(twin).items() if name not in weights}
        weights.update({name: mx.zeros_like(one) for name, one in missing.items() if name.endswith(".bias")})
    twin.load_weights([(name.removeprefix("."), array) for name, array in weights.items()])
    evaluate(twin)
    return twin


def _row_grouped(path: str, layer: ZigzagLayer, dtype: mx.Dtype) -> dict[str, mx.array]:
    bits, group_size = layer.bits, layer.group_size
    scales, biases = layer["scales"].astype(dtype), layer["biases"].astype(dtype)
    w = layout.dequantize(
        layer.weight, scales, biases, outputs=layer.outputs, bits=bits, group_size=group_size
    )
    packed = {"weight": w}
    if layer.inputs % group_size == 0:
        names = ("weight", "scales", "biases")
        packed = dict(zip(names, layout.quantize_rows(w, bits, group_size), strict=True))
    if "bias" in layer:
        packed["bias"] = layer.bias
    return {f"{path}.{key}": array for key, array in packed.items()}


def evaluate(model: nn.Module) -> None:
    """Compute a model's arrays one module at a time, so that few unquantized ones exist at once.

    On a CPU a Zigzag model's then lie in large pages, as those of a folder that is loaded do.
    """
    for module in model.modules():
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])
    mx.clear_cache()
    if many_rows.on_cpu() and zigzag_layers(model):
        held = arrays(model)  # till the end, else copies go where freed ones were, into small pages
        with heap.in_large_pages(sum(array.nbytes for array in held.values())):
            for module in model.modules():
                _copy_arrays(module)
            del held


def _copy_arrays(module: nn.Module) -> None:
    """Let a module have copies of its arrays."""
    for name, value in module.items():
        if isinstance(value, mx.array) and value.itemsize <= 4:
            bits = value.view((mx.uint8, mx.uint16, mx.uint32)[value.itemsize.bit_length() - 1])
            module[name] = (bits | 0).view(value.dtype)
            mx.eval(module[name])


def check_memory(zigzag: nn.Module, name: str) -> None:
    """Refuse a model that does not fit twice: in the Zigzag layout, and row-grouped."""
    layers = sum(one.weight.nbytes + 2 * one.scales.nbytes for one in zigzag_layers(zigzag).values())
    wanted = layers + sum(array.nbytes for array in arrays(zigzag).values())
    info = mx.device_info()
    on_cuda = mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available()
    there = info.get("total_memory") if on_cuda else psutil.virtual_memory().available
    if isinstance(there, int) and wanted > there:
        raise ResourceError(
            f"{name} takes {wanted / 1e9:.1f} GB in both layouts, and {there / 1e9:.1f} GB are there",
            "--blocks measures a model of fewer blocks",
        )


def caches(subject: Subject, depth: int) -> dict[str, list[Any]]:
    """Fresh caches, `zigzag` and `stock`, that hold `depth` tokens; the same numbers in both."""
    from mlx_lm.models.cache import make_prompt_cache

    zigzag = make_prompt_cache(subject.zigzag)
    for start in range(0, depth, CHUNK_TOKENS):
        probes.advance(subject.zigzag, subject.prompt(start, min(CHUNK_TOKENS, depth - start))[None], zigzag)
    return {"zigzag": zigzag, "stock": copy.deepcopy(zigzag)}


def fit_thresholds(
    model: nn.Module, sparsity: float, tokens: mx.array, cache: list[Any]
) -> dict[str, mx.array]:
    """Path -> threshold, (1,) float32: each layer skips that fraction of its inputs over `tokens` (n,).

    Layer after layer in one pass, each fed by the layers before it as they will run, skipping: fitted
    to a dense run, thresholds would skip ever more, since skipping shrinks what comes after.
    """
    layers = zigzag_layers(model)
    fits = [(path, _Fit(layer, sparsity)) for path, layer in layers.items()]
    model.update_modules(tree_unflatten(fits))
    try:
        probes.advance(model, tokens[None], copy.deepcopy(cache))
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
    return {path: fit.threshold for path, fit in fits}


class _Fit(nn.Module):
    """Finds a layer's threshold from the first input it meets, and skips by it."""

    def __init__(self, layer: ZigzagLayer, sparsity: float) -> None:
        super().__init__()
        self._layer, self._sparsity = layer, sparsity
        self.threshold = mx.zeros(1)

    def __call__(self, x: mx.array, *chosen: Any, **named: Any) -> mx.array:
        magnitudes = mx.sort(mx.abs(x.astype(mx.float32)).reshape(-1))
        self.threshold = magnitudes[int(self._sparsity * x.size)][None]
        mx.eval(self.threshold)
        masked = layout.mask(x, self.threshold)
        if chosen:
            y = many_rows.experts(masked, chosen[0], self._layer, **named)
        else:
            y = many_rows.linear(masked, self._layer)
        part = self._layer.part
        return y if part is None else part.finish(y)
