"""Sources that are quantized already: mlx-lm loads them, and their weights are widened again, lazily."""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from spqt_cli import checks
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import CONFIG
from spqt_cli.source import Checkpoint


def load(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, mx.array]]:
    """mlx-lm's model with plain layers in place of quantized ones, and its lazy weights.

    The model's own arrays are replaced by random ones that are never computed, so that a weight is
    held by the returned dict alone.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = _view(checkpoint, Path(temporary))
        try:
            model, _ = load_model(folder, lazy=True)
        except (LookupError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
            raise SpqtError(
                f"{checkpoint.name}: mlx-lm can't load this quantized model ({error})", checks.AGAIN
            ) from None
    model = dequantize_model(model)
    still = [path for path, module in model.named_modules() if "scales" in module]
    if still:
        raise UnsupportedError(
            f"{checkpoint.name}: quantized layers of a kind that can't be widened: {checks.named(still)}",
            "convert the original model",
        )
    weights = dict(tree_flatten(model.parameters()))
    stand_ins = [(name, mx.zeros(array.shape, array.dtype)) for name, array in weights.items()]
    model.load_weights(stand_ins)
    return model, weights


def _view(checkpoint: Checkpoint, temporary: Path) -> Path:
    """A folder of links to just the model's files: mlx-lm loads whatever matches, at a path without globs."""
    folder = temporary / "model"
    folder.mkdir()
    shards = checkpoint.files()
    for i, path in enumerate(shards, 1):
        (folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors").symlink_to(path.resolve())
    (folder / CONFIG).write_text(json.dumps(checkpoint.config), encoding="utf-8")  # as it is settled
    if (checkpoint.folder / "hf_quant_config.json").exists():
        (folder / "hf_quant_config.json").symlink_to((checkpoint.folder / "hf_quant_config.json").resolve())
    return folder
