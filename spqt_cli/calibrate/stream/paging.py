"""Weights that stay on disk: when a calibration leaves them there, and how a block's are read and dropped."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from spqt_cli.decode import hooks
from spqt_cli.errors import UsageError
from spqt_cli.measure import many_rows, probes

METHODS = ("uniform", "paper", "fast")  # auto holds two candidates against each other in memory
MEMORY_SHARE = 0.8  # of the available memory that weights may take: hidden states and logits need the rest


def shard_bytes(folder: Path) -> int:
    """The bytes of a converted folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def too_large(folder: Path) -> bool:
    """True where the weights of a folder don't fit in the memory that is available."""
    import psutil

    return shard_bytes(folder) > MEMORY_SHARE * psutil.virtual_memory().available


def wanted(folder: Path, options: Any) -> bool:
    """True where a calibration (CalibrateOptions) is to load one block at a time: as asked, or by need."""
    return too_large(folder) if options.stream is None else options.stream


def stepped_down(folder: Path, options: Any) -> Any:
    """CalibrateOptions with what can be done block by block; a line on stderr says what is not."""
    if (options.max_kl, options.max_ppl_increase, options.min_tokens_per_second) != (None, None, None):
        raise UsageError(
            "a limit is found in many passes, for which the model must fit in memory",
            "give --sparsity instead",
        )
    if options.method in METHODS:
        return replace(options, stream=True)
    note(
        f"method {options.method} measures candidates with the whole model in memory; block by block "
        "the method is fast: shares by gradients, not held against uniform ones"
    )
    return replace(options, stream=True, method="fast")


def note(line: str) -> None:
    """Print a line for people on stderr."""
    print(f"note: {line}", file=sys.stderr)


def clear(folder: Path) -> None:
    """A calibration is done: remove the hidden states that it kept."""
    for left in folder.glob(".spqt-hidden-*"):
        left.unlink(missing_ok=True)


class Weights:
    """The weights of blocks, read anew from the shards whenever a block was used."""

    def __init__(self, folder: Path, model: nn.Module, harness: probes.Harness) -> None:
        self._modules = {**dict(model.named_modules()), **harness.layers}  # layers, not their probes
        self._files = {
            name: file for file in sorted(folder.glob("model*.safetensors")) for name in _stored(file)
        }

    def drop(self, prefix: str) -> None:
        """Put unread arrays in the place of a block's weights, which frees what was read."""
        names = [name for name in self._files if name.startswith(prefix + ".")]
        for file in {self._files[name] for name in names}:
            stored = _stored(file)
            for name in names:
                path, _, attribute = name.rpartition(".")
                if self._files[name] == file and path in self._modules:
                    self._modules[path][attribute] = stored[name]
        if many_rows.on_cpu():
            hooks.compute_in_float32(self._modules[prefix])
        mx.clear_cache()


def _stored(file: Path) -> dict[str, mx.array]:
    """Name -> array of a shard, none of them read yet."""
    return cast("dict[str, mx.array]", mx.load(str(file)))
