"""Has a model's GPU kernels compiled and checked while it is loaded, when nothing else is under way.

A kernel that fails to compile or start in the middle of a step can take the step's other arrays with it (mlx
pull request 3675 tells how). Here one step is made and thrown away. It knows models and layers; what is
right, and what takes a wrong kernel's place, the backend knows.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import select
from spqt_cli.decode import fused, phase
from spqt_cli.decode.layers import ZigzagLayer, base


def check(model: nn.Module) -> list[str]:
    """Why some kernels of this model's steps are not used here, a line each; empty where all are.

    Runs one decode step on a cache of its own, so the model's weights are read once. Does nothing on backends
    whose kernels are not compiled when they are used.
    """
    backend = select.backend()
    if backend.check is None:
        return []
    from mlx_lm.models.cache import make_prompt_cache

    layers = [base(one) for one in model.modules()]
    zigzag = [one for one in layers if isinstance(one, ZigzagLayer)]
    if not zigzag:
        return []
    with phase.decoding():
        mx.eval(model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model)))
    fused.forget(model)
    for layer in zigzag:
        layer.shared_input.forget()  # another thread may decode, and on another stream
    return backend.check(_groups(zigzag))


def _groups(layers: list[ZigzagLayer]) -> list[list[Any]]:
    """Layers that run in one launch, each such group once."""
    shared = {id(one.shared_input): one.shared_input for one in layers}
    return [list(one.layers) for one in shared.values()]
