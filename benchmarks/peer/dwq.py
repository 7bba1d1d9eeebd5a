"""Stock mlx-lm's row-grouped layout with scales and biases distilled by mlx-lm's own `dwq_quantize`.

mlx-lm's command line (`mlx_lm.dwq`) takes its text from the hub through the package `datasets`. Here the same
function gets windows of a local text, so that it sees what our own fit sees. Computed in float32; saved in
the source's dtype. On a GPU that is minutes; docs/quality.md says what a step costs on a CPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.convert import source as sources
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from spqt_cli.evaluate import variants
from spqt_cli.format import config_json
from spqt_cli.measure import texts

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
    source: str, rows: variants.Settings, windows: np.ndarray, output: Path, settings: Settings
) -> dict[str, Any]:
    """Write the distilled model to `output`, a folder that mlx-lm loads; returns what it was trained on.

    rows: bits and group size of every module that is quantized. windows: (count, tokens). Raises SpqtError
    for a source that is no folder, for too few windows, and where the output exists.
    """
    from mlx import optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import save

    folder = sources.open_source(source, None, sources.Trust(requantize=True)).folder
    if not Path(source).is_dir() or output.exists():
        raise SpqtError(f"{source} is no folder, or {output} exists", "name a source's folder, a new output")
    train, valid = split(windows, settings)
    teacher, student = variants.load_source(source), variants.load_source(source, rows)
    for network in (teacher, student):
        network.set_dtype(mx.float32)
    adam = optimizers.Adam(settings.learning_rate, bias_correction=True)
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


def split(windows: np.ndarray, settings: Settings) -> tuple[list[Any], list[Any]]:
    """(train, valid) as mlx-lm takes them: (tokens, offset) each; every 16th window is held out."""
    valid = [(row.tolist(), 0) for row in windows[::HELD_OUT]]
    valid = (valid * settings.batch)[: max(len(valid), settings.batch)]  # mlx-lm wants a batch at least
    train = [(row.tolist(), 0) for at, row in enumerate(windows) if at % HELD_OUT] * settings.epochs
    if len(train) < settings.batch:
        raise SpqtError(f"{len(windows)} windows are too few to distil on", "give more --tokens")
    return train, valid


def quantization(rows: variants.Settings) -> dict[str, Any]:
    """mlx-lm's `quantization` section for bits and groups by path."""
    bits, group = max(set(rows.values()), key=list(rows.values()).count)
    own = {path: {"bits": one[0], "group_size": one[1]} for path, one in rows.items() if one != (bits, group)}
    return {"bits": bits, "group_size": group, "mode": "affine", **own}


def windows_of(path: Path | None, tokenizer: Any, tokens: int, window: int) -> np.ndarray:
    """(count, window) tokens from a text, or from a .npy file of whole windows; None: the shipped text."""
    if path is not None and path.suffix == ".npy":
        found = np.load(path)
        return found[: max(1, tokens // found.shape[1])]
    document = texts.read(path)
    found = texts.windows(texts.tokens(document, tokenizer), window, texts.opening(tokenizer))
    return found[: max(1, tokens // window)]
