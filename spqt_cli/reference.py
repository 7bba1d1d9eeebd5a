"""The models that quality is measured against: the unquantized source, and MLX's own quantization.

They are computed from what `spqt convert` reads (a folder, a hub id or a .gguf file), in memory only.
"""

from typing import Any

import mlx.core as mx
from mlx import nn

from spqt_cli import blas, parameters, plan, source
from spqt_cli.plan import ROWS, ZIGZAG, Plan


def load(name: str, rows: tuple[int, int] | None = None) -> nn.Module:
    """The model of a source, unquantized, or with `rows` = (bits, group size) as mlx-lm quantizes it.

    Row-grouped layers are exactly the ones that convert makes Zigzag, or keeps row-grouped.
    On the CPU it computes in float32, as converted models do.
    """
    checkpoint = source.open_source(name, None, source.Trust(requantize=True))
    model, weights, names = parameters.load(checkpoint)
    if checkpoint.gguf is not None:
        weights = {parameter: checkpoint.read(tensor) for parameter, tensor in names.items()}
    model.eval()
    model.load_weights(list(weights.items()))
    if rows is not None:
        planned, _ = plan.make(checkpoint, plan.Wishes(*rows))
        _quantize_rows(model, planned, *rows)
    if blas.on_cpu():
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def _quantize_rows(model: nn.Module, planned: Plan, bits: int, group_size: int) -> None:
    kinds = {unit.path: unit for unit in planned.units if unit.kind in (ZIGZAG, ROWS)}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        unit = kinds.get(path)
        if unit is None or not hasattr(module, "to_quantized"):
            return False
        if unit.kind == ROWS:
            return {"group_size": unit.group_size, "bits": unit.bits}
        return {"group_size": group_size, "bits": bits}

    nn.quantize(model, group_size, bits, class_predicate=choose)
