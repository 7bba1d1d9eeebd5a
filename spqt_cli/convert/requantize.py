"""Weights that MLX packs itself: experts in 4-bit floats stay as they are, all else is widened.

Another rounding costs those experts a fifth of their precision, so they become Zigzag only on demand
(`Checkpoint.repacks_experts`), and it is said. A widened weight is lazy, as all others.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.convert.source import Checkpoint
from spqt_cli.convert.unpack import methods
from spqt_cli.errors import AGAIN, SpqtError

KEPT = {"mxfp4": 32, "nvfp4": 16}  # modes in which experts stay as they are, and their group sizes

ROUNDED = (
    "experts in 4-bit floats are rounded once more, to be skipped by channels: their error grows "
    "(docs/sources.md says by how much)"
)


def settle(model: nn.Module, weights: dict[str, mx.array], checkpoint: Checkpoint) -> None:
    """Put plain numbers into `weights` for what MLX packs; `model` then takes what stays packed."""
    from mlx_lm.models.switch_layers import SwitchLinear

    modules = dict(model.named_modules())
    kept: dict[str, dict[str, Any]] = {}
    for path in [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]:
        module = modules.get(path)
        if module is None or f"{path}.weight" not in weights or "weight" not in module:
            raise SpqtError(f"{checkpoint.name}: tensor {path}.scales belongs to no weight", AGAIN)
        try:
            found = _settings(path, module, weights, checkpoint)
            # with a scale for all of an expert MLX multiplies on a GPU only
            is_kept = found["mode"] in KEPT and f"{path}.global_scale" not in weights
            if isinstance(module, SwitchLinear) and is_kept and not checkpoint.repacks_experts:
                _check_words(path, weights, found)
                kept[path] = found
            else:
                _widen(path, weights, found, checkpoint)
        except (LookupError, ValueError, TypeError, ArithmeticError) as error:
            raise SpqtError(
                f"{checkpoint.name}: tensor {path}.weight does not belong to its scales ({error})",
                AGAIN,
            ) from None
        if isinstance(module, SwitchLinear) and found["mode"] in KEPT and ROUNDED not in checkpoint.warnings:
            checkpoint.warnings += [] if path in kept else [ROUNDED]
    if kept:
        nn.quantize(model, class_predicate=lambda path, _: kept.get(path, False))


def settings(module: nn.Module) -> dict[str, Any]:
    """The entry in config.json of a module that is packed as MLX packs."""
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def _settings(
    path: str, module: nn.Module, weights: dict[str, mx.array], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Bits, group size and mode of one weight, as mlx-lm finds them."""
    from mlx_lm.utils import infer_quant_config

    said = (
        checkpoint.quantization.get(path) if methods.named(checkpoint.quantization) == methods.MLX else None
    )
    found = said if isinstance(said, dict) else infer_quant_config(path, module, weights)
    found = {key: found.get(key) for key in ("group_size", "bits", "mode")}
    found["mode"] = str(found["mode"] or "affine")
    return found


def _check_words(path: str, weights: dict[str, mx.array], found: dict[str, Any]) -> None:
    if (found["bits"], found["group_size"]) != (4, KEPT[found["mode"]]):
        raise ValueError(f"{found['bits']} bits and groups of {found['group_size']} are not {found['mode']}")
    dtypes = (weights[f"{path}.weight"].dtype, weights[f"{path}.scales"].dtype)
    if dtypes != (mx.uint32, mx.uint8):
        raise ValueError(f"they are {dtypes[0]} and {dtypes[1]}")


def _widen(path: str, weights: dict[str, mx.array], found: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Put the plain numbers of one weight in the place of its packed ones."""
    words, scales = weights[f"{path}.weight"], weights.pop(f"{path}.scales")
    biases, whole = weights.pop(f"{path}.biases", None), weights.pop(f"{path}.global_scale", None)
    floating = mx.issubdtype(scales.dtype, mx.floating)
    dtype = None if floating else methods.dtype_of(checkpoint.config)
    how = {"group_size": found["group_size"], "bits": found["bits"], "mode": found["mode"], "dtype": dtype}
    if whole is not None and whole.ndim:  # one for each expert
        each = zip(words, scales, whole, strict=True)
        plain = mx.stack([mx.dequantize(w, s, global_scale=g, **how) for w, s, g in each])
    else:
        plain = mx.dequantize(words, scales, biases, global_scale=whole, **how)
    weights[f"{path}.weight"] = plain
