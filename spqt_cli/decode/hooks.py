"""The hooks into mlx-lm: `install` makes `mlx_lm.load` understand Zigzag layers.

`nn.quantize` passes each layer's entry of config.json to `to_quantized`, so one wrapped method is a
complete loader hook; a second one, on `load_weights`, sees the whole model once its weights are in.
foreign.py lists all that is replaced; hooks_cpu.py and hooks_generate.py hold the CPU's and the loops' part.
"""

import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import select
from spqt_cli.decode import (
    bytes_read,
    exact,
    foreign,
    fused,
    hooks_cpu,
    hooks_generate,
    hooks_sharding,
    kernel_check,
    parallel,
    profile,
)
from spqt_cli.decode.layers import ZigzagLayer, ZigzagLinear, share_inputs, zigzag_layers
from spqt_cli.errors import SpqtError
from spqt_cli.format import contract, thresholds
from spqt_cli.system import heap

_load_weights = nn.Module.load_weights
_refusal: ContextVar[SpqtError | None] = ContextVar("refusal", default=None)
_follows_profile: ContextVar[bool] = ContextVar("follows_profile", default=True)
_is_cut_later: ContextVar[bool] = ContextVar("is_cut_later", default=False)
_log = logging.getLogger("spqt")


def _to_quantized(stock: Callable[..., Any], make: Callable[..., ZigzagLayer]) -> Callable[..., Any]:
    """A layer's `to_quantized` that makes Zigzag ones by `make`, all others by MLX's own."""

    def to_quantized(self: Any, group_size: Any = None, bits: Any = None, mode: str = "affine", **kw: Any):
        if mode != "zigzag":
            return stock(self, group_size, bits, mode, **kw)
        if error := _refusal.get():
            raise error
        kw.pop(contract.NEEDS, None)
        layer = make(self, group_size, bits, **kw)
        sparsity, curve = wished_sparsity(), (kw.get("spqt") or {}).get("curve")
        object.__setattr__(layer, "curve", curve)  # not as a module keeps it, among its parameters
        if sparsity is not None and curve:
            layer.set_threshold(thresholds.derive(curve, sparsity) or None)
        return layer

    return to_quantized


_linear_to_zigzag = _to_quantized(nn.Linear.to_quantized, ZigzagLinear.from_linear)


def _hook_experts(switch_layers: Any) -> None:
    """Let mlx-lm's `SwitchLinear` become `ZigzagSwitchLinear`."""
    from spqt_cli.decode.experts import ZigzagSwitchLinear

    kind = switch_layers.SwitchLinear
    if kind.to_quantized.__module__ != __name__:
        ours = _to_quantized(kind.to_quantized, ZigzagSwitchLinear.from_switch_linear)
        foreign.replace(kind, "to_quantized", ours)


def wished_sparsity() -> float | None:
    """SPQT_SPARSITY: another sparsity, where no flag of ours reaches (spqt mlx-lm ...)."""
    text = os.environ.get("SPQT_SPARSITY")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    thresholds.check_sparsity(value, f"SPQT_SPARSITY={text!r}")
    return value


@contextlib.contextmanager
def refusing(error: SpqtError) -> Iterator[None]:
    """Within the block loading a model with Zigzag layers raises `error`."""
    token = _refusal.set(error)
    try:
        yield
    finally:
        _refusal.reset(token)


@contextlib.contextmanager
def as_stored() -> Iterator[None]:
    """Within the block models are loaded as their folder has them, whatever this device's profile says."""
    token = _follows_profile.set(False)
    try:
        yield
    finally:
        _follows_profile.reset(token)


@contextlib.contextmanager
def cut_later() -> Iterator[None]:
    """Models that are loaded within the block will be cut over processes, then given to `make_ready`."""
    token = _is_cut_later.set(True)
    try:
        yield
    finally:
        _is_cut_later.reset(token)


def _load_weights_and_prepare(self: nn.Module, file_or_weights: Any, strict: bool = True) -> nn.Module:
    """Load weights; a model with Zigzag layers is then made ready for its backend."""
    result = _load_weights(self, file_or_weights, strict)
    if zigzag_layers(self):
        if mx.default_device().type == mx.DeviceType.cpu:
            compute_in_float32(self)
        if select.backend().native_float32:
            hooks_cpu.install()
        if _is_cut_later.get():
            return result
        make_ready(self)
        follows = strict and _follows_profile.get()  # with only a part of the weights nothing is repacked
        if follows and (said := profile.follow(self, profile.stored_curves(self), wished_sparsity())):
            _log.warning(said)
    return result


def make_ready(model: nn.Module) -> None:
    """Form what runs in one call of a model's Zigzag layers, which have the sizes now that they keep."""
    share_inputs(model)
    bytes_read.tell_chosen(model)
    fused.install(model)


class _OnImport(MetaPathFinder):
    """Hooks mlx_lm's modules as they are imported, and not before: mlx_lm holds on to MLX's device."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in _HOOKS:
            return None
        found: Any = PathFinder.find_spec(fullname, path, target)
        run = found.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _HOOKS[fullname](module)

        found.loader.exec_module = exec_module
        return found


def _hook_loading(utils: Any) -> None:
    """Let mlx-lm's load_model put in what its class leaves out of a config (`exact`)."""
    stock = utils.load_model
    if getattr(stock, "is_exact", False):
        return

    @functools.wraps(stock)
    def load_model(path: Any, lazy: bool = False, strict: bool = True, **kw: Any) -> Any:
        get = kw.pop("get_model_classes", utils._get_classes)
        with contextlib.nullcontext() if lazy else _large_pages(path):
            found = stock(
                path, lazy, strict, get_model_classes=lambda config: exact.classes(get, config), **kw
            )
        parallel.prepare(*found)
        if not lazy and _follows_profile.get():  # else whoever loads it has more to do first: session.py
            kernel_check.check(found[0])
        return found

    hooked: Any = load_model
    hooked.is_exact = True
    foreign.replace(utils, "load_model", hooked)
    foreign.replace_everywhere(utils, "sharded_load", _sharded(utils.sharded_load))


def _large_pages(path: Any) -> contextlib.AbstractContextManager[None]:
    """In this block a folder's weights are read into large pages, if the CPU will decode from them."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return contextlib.nullcontext()
    return heap.in_large_pages(sum(file.stat().st_size for file in Path(path).glob("*.safetensors")))


def _sharded(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's sharded_load, after which Zigzag layers run as elsewhere."""

    @functools.wraps(stock)
    def sharded_load(repo: Any, pipeline_group: Any = None, tensor_group: Any = None, *args: Any, **kw: Any):
        with cut_later(), parallel.sharding(pipeline_group, tensor_group):
            found = stock(repo, pipeline_group, tensor_group, *args, **kw)
        parallel.meet(pipeline_group or tensor_group)
        if zigzag_layers(found[0]):
            make_ready(found[0])
        return found

    return sharded_load


def _hook_adapters(_: Any) -> None:
    """Let mlx-lm's adapters take Zigzag layers; what does that is made of their classes."""
    from spqt_cli.decode import adapters

    adapters.install()


_HOOKS: dict[str, Callable[[Any], None]] = {
    "mlx_lm.utils": _hook_loading,
    "mlx_lm.tuner.utils": _hook_adapters,
    "mlx_lm.models.switch_layers": _hook_experts,
    "mlx_lm.generate": hooks_generate.install,
    "mlx_lm.perplexity": hooks_generate.check_perplexity,
    "mlx_lm.server": hooks_generate.refuse_long,
}


def compute_in_float32(model: nn.Module) -> None:
    """Cast what is not packed to float32: MLX's CPU build runs 16-bit types 30 times slower.

    Lazy, so each array is converted as it is first read; the stored folder keeps its dtype. Our own
    kernels read 16-bit scales as they are, which is less to read.
    """
    native = select.backend().native_float32
    for module in model.modules():
        packed = native and isinstance(module, (nn.QuantizedLinear, ZigzagLayer))
        for name, value in module.items():
            if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
                continue
            if not (packed and name in ("scales", "biases")):
                module[name] = value.astype(mx.float32)


def install() -> None:
    """Patch MLX's modules; doing it twice changes nothing."""
    foreign.replace(nn.Linear, "to_quantized", _linear_to_zigzag)
    foreign.replace(nn.Module, "load_weights", _load_weights_and_prepare)
    hooks_sharding.install()
    for name, hook in _HOOKS.items():
        if name in sys.modules:
            hook(sys.modules[name])
    if not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
