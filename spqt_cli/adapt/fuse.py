"""`spqt fuse`: a converted folder whose weights hold an adapter, rounded again into the layout.

The adapted layers' tensors are overwritten in a copy of the folder, which appears complete or not at all.
Thresholds belong to weights, so the copy has none.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from spqt_cli.convert import card, encode
from spqt_cli.convert.source import DTYPES
from spqt_cli.decode import adapter_folder, session
from spqt_cli.decode.layers import ZigzagLayer, base
from spqt_cli.errors import SpqtError
from spqt_cli.fit.weights_file import WeightsFile, copy_folder
from spqt_cli.format import layout, locate
from spqt_cli.format.checkpoint_files import Tensor
from spqt_cli.format.folder import Folder
from spqt_cli.system import files

PACKED = ("weight", "scales", "biases")


@dataclass
class FuseResult:
    """What was fused. layers: how many hold an adapter now."""

    output: Path
    layers: int
    had_thresholds: bool

    def summary(self) -> str:
        """One or two lines for people."""
        said = f"{self.output}: an adapter fused into {self.layers} layers"
        lost = "note: thresholds belonged to the weights before: calibrate again"
        return f"{said}\n{lost}" if self.had_thresholds else said


def fuse(model: str, adapter: Path, output: Path) -> FuseResult:
    """Write a copy of a converted folder with an adapter in its weights.

    model: a folder or hub id; adapter: as mlx-lm's `lora` writes it. Raises SpqtError and its kinds.
    """
    folder, output = locate.open_folder(model), files.expanded(output).absolute()
    config = adapter_folder.check(files.expanded(adapter))
    files.check_target(output, folder.path)
    with files.claim(output):
        files.check_target(output, folder.path)
        work = files.new_work_folder(output)
        try:
            copy_folder(folder.path, work / "model")
            layers = _write(folder, adapter, work / "model", config)
            Folder(work / "model")
            files.publish(work / "model", output)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return FuseResult(output, layers, folder.calibration is not None)


def _write(folder: Folder, adapter: Path, target: Path, config: dict[str, Any]) -> int:
    """Overwrite the adapted layers' tensors in `target`; how many layers they are."""
    model = session.load_lazily(folder).model
    adapter_folder.put_on(model, adapter)
    adapted = {path: module for path, module in model.named_modules() if "lora_a" in module}
    if not adapted:
        raise SpqtError(f"{adapter} holds whole weights, not a LoRA or DoRA adapter", "nothing to fuse")
    with WeightsFile(target) as output:
        for path, module in adapted.items():
            for name, array in _tensors(path, module, folder.tensors).items():
                output.write(name, array)
            mx.clear_cache()
        kind = config.get("fine_tune_type", "lora")
        output.finish("adapter", {"kind": kind, "layers": len(adapted)})
    with files.disk_errors(target), (target / card.NAME).open("ab") as readme:
        readme.write(f"\nA {kind} adapter was fused into {len(adapted)} of its layers.\n".encode())
    return len(adapted)


def _tensors(path: str, adapter: Any, stored: Any) -> dict[str, mx.array]:
    """The stored tensors of one adapted layer, adapter and all, evaluated."""
    layer = base(adapter)
    if isinstance(layer, ZigzagLayer):
        from spqt_cli.decode import adapters  # builds on mlx-lm's tuner, which put the adapter on

        whole = adapters.merged(adapter).astype(_dtype(stored[f"{path}.scales"]))
        parts = layout.quantize(whole, layer.bits, layer.group_size, layer.band)
        found = dict(zip(PACKED, parts, strict=True))
    else:
        fused: nn.Module = adapter.fuse()
        found = {name: fused[name] for name in PACKED if fused.get(name) is not None}
    arrays = {f"{path}.{name}": array for name, array in found.items()}
    arrays = {name: array.astype(_dtype(stored[name])) for name, array in arrays.items()}
    mx.eval(arrays)
    if not all(map(encode.is_finite, arrays.values())):
        raise SpqtError(f"the adapter makes {path} NaN or infinite", adapter_folder.DAMAGED)
    return arrays


def _dtype(tensor: Tensor) -> mx.Dtype:
    return DTYPES[tensor.dtype]
