"""Runs in which MLX's own functions compute: what a stock model is timed in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from spqt_cli.backends import select
from spqt_cli.decode import hooks_cpu


@contextmanager
def only_mlx() -> Iterator[None]:
    """In this block MLX's own functions run, also where the CPU backend stands behind their names."""
    native = select.backend().native_float32
    if native:
        hooks_cpu.remove()
    try:
        yield
    finally:
        if native:
            hooks_cpu.install()


def check_unpatched(model: nn.Module) -> None:
    """Raise RuntimeError where code of ours would run in a stock model: it would be no baseline."""
    owners: list[tuple[Any, str]]
    owners = [(type(module), name) for module in model.modules() for name in ("__call__", "as_linear")]
    owners += [(mx.fast, name) for name in ("rms_norm", "rope", "scaled_dot_product_attention")]
    owners += [(mx, "quantized_matmul")]
    for owner, name in owners:
        found = getattr(owner, name, None)
        if (getattr(found, "__module__", None) or "").startswith("spqt_cli"):
            raise RuntimeError(f"{owner.__name__}.{name} is spqt's, so the stock model is not stock")
