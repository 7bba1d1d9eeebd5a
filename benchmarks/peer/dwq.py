"""Stock mlx-lm's row-grouped layout with scales and biases distilled by mlx-lm's own `dwq_quantize`.

mlx-lm's command line (`mlx_lm.dwq`) takes its text from the hub through the package `datasets`. Here the same
function gets windows of a local text, so that it sees what our own fit sees. Computed in float32; saved in
the source's dtype. On a CPU its products run through numpy's BLAS, forward and backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.convert import source_model
from spqt_cli.decode import foreign, session
from spqt_cli.errors import SpqtError
from spqt_cli.format import config_json
from spqt_cli.measure import many_rows, texts

HELD_OUT = 16  # every so many windows one, for mlx-lm's validation
SEED = 123  # mlx-lm's default


@dataclass(frozen=True)
class Settings:
    """learning_rate, batch (windows a step), temperature: mlx-lm's defaults. epochs: passes over the text."""

    learning_rate: float = 1e-6
    batch: int = 4
    temperature: float = 2.0
    epochs: int = 1


def distil(
    source: str, rows: source_model.Settings, windows: np.ndarray, output: Path, settings: Settings
) -> dict[str, Any]:
    """Write the distilled model to `output`, a folder that mlx-lm loads; returns what it was trained on.

    rows: bits and group size of every module that is quantized. windows: (count, tokens). Raises SpqtError
    for a source that is no folder, for too few windows, and where the output exists.
    """
    from mlx import optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import save

    folder = source_model.open_source(source).folder
    if not Path(source).is_dir() or output.exists():
        raise SpqtError(f"{source} is no folder, or {output} exists", "name a source's folder, a new output")
    train, valid = split(windows, settings)
    teacher, student = source_model.load(source), source_model.load(source, rows)
    for network in (teacher, student):
        network.set_dtype(mx.float32)
    adam = optimizers.Adam(settings.learning_rate, bias_correction=True)
    with fast_on_cpu():
        dwq_quantize(
            student, lambda batch, *_, **__: teacher(batch), adam,
            train, valid, settings.batch, windows.shape[1], SEED,
            dtype=mx.float32, temperature=settings.temperature,
        )  # fmt: skip
    config = config_json.read_config(folder)
    student.set_dtype(getattr(mx, config.get("torch_dtype", "float16")))
    save(
        output, folder, student, session.load_tokenizer(folder), config | {"quantization": quantization(rows)}
    )
    return {"steps": len(train) // settings.batch, "windows": len(windows), "tokens": int(windows.size)}


@contextmanager
def fast_on_cpu() -> Iterator[None]:
    """In this block products of row-grouped layers run through BLAS on the CPU, and can still be trained."""
    kinds = ((nn.QuantizedLinear, "__call__"), (nn.QuantizedEmbedding, "as_linear"))
    own = [(kind, name, trainable) for kind, name in kinds] if many_rows.on_cpu() else []
    with many_rows.many_rows(), foreign.replaced(own):
        yield


def trainable(layer: Any, x: mx.array) -> mx.array:
    """x (..., inputs) @ w.T of a row-grouped layer, differentiable by x, scales and biases."""
    codes = many_rows.codes(np.array(layer.weight, copy=False), layer.bits)  # (outputs, inputs)
    codes = codes.reshape(*layer.scales.shape, layer.group_size)
    shape = (codes.shape[0], -1)

    def weights(scales: mx.array, biases: mx.array) -> np.ndarray:
        w = codes * np.array(scales)[..., None]
        w += np.array(biases)[..., None]
        return w.reshape(shape)

    @mx.custom_function
    def forward(rows: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.array(many_rows.host(rows) @ weights(scales, biases).T)

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        rows, scales, biases = primals
        dy = many_rows.host(cotangent)
        dw = (dy.T @ many_rows.host(rows)).reshape(codes.shape)
        by_scales = np.einsum("ogk,ogk->og", dw, codes.astype(np.float32))
        return mx.array(dy @ weights(scales, biases)), mx.array(by_scales), mx.array(dw.sum(axis=-1))

    y = cast(mx.array, forward(x.reshape(-1, x.shape[-1]), layer.scales, layer.biases))
    y = y.reshape(*x.shape[:-1], shape[0])
    return y + layer.bias if "bias" in layer else y


def split(windows: np.ndarray, settings: Settings) -> tuple[list[Any], list[Any]]:
    """(train, valid) as mlx-lm takes them: (tokens, offset) each; every 16th window is held out."""
    valid = [(row.tolist(), 0) for row in windows[::HELD_OUT]]
    valid = (valid * settings.batch)[: max(len(valid), settings.batch)]  # mlx-lm wants a batch at least
    train = [(row.tolist(), 0) for at, row in enumerate(windows) if at % HELD_OUT] * settings.epochs
    if len(train) < settings.batch:
        raise SpqtError(f"{len(windows)} windows are too few to distil on", "give more --tokens")
    return train, valid


def quantization(rows: source_model.Settings) -> dict[str, Any]:
    """mlx-lm's `quantization` section for bits and groups by path."""
    bits, group = max(set(rows.values()), key=list(rows.values()).count)
    own = {path: {"bits": one[0], "group_size": one[1]} for path, one in rows.items() if one != (bits, group)}
    return {"bits": bits, "group_size": group, "mode": "affine", **own}


def windows_of(path: Path | None, tokenizer: Any, tokens: int, window: int) -> np.ndarray:
    """(count, window) tokens of a text (None: the shipped one), or as a .npy file has them, or `windows` of
    the .npz file that our own fit keeps.
    """
    if path is not None and path.suffix in (".npy", ".npz"):
        found = np.load(path)
        found = found if path.suffix == ".npy" else found["windows"]
        return found[: max(1, tokens // found.shape[1])]
    document = texts.read(path)
    found = texts.windows(texts.tokens(document, tokenizer), window, texts.opening(tokenizer))
    return found[: max(1, tokens // window)]
