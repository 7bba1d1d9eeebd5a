"""Which backend multiplies, and the calls that do it.

`gpu/` holds the Metal and CUDA kernels, `cpu.py` the C++ extension, `stock.py` MLX's own matmul. A new
backend is one module with the functions of `interface.Calls`, and one line in `BACKENDS`.
"""

import os
from collections.abc import Sequence

import mlx.core as mx

from spqt_cli.backends import cpu, stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.interface import (
    Backend,
    Calls,
    Experts,
    ExpertsStep,
    GatedStep,
    HeadStep,
    Middle,
    MiddleStep,
    Mixture,
    MixtureStep,
    Norm,
    Projection,
    Rotary,
    RotaryStep,
    Step,
    Tail,
    TailStep,
)
from spqt_cli.errors import UsageError

MOST_ROWS = 64  # of `sparse_rows`
MOST_CHOSEN = 512  # pairs of a token and an expert in an `ExpertsStep`: 64 tokens of 8 experts each

# In this order: the first that runs on the default device is taken.
BACKENDS: tuple[Calls, ...] = (
    gpu,
    cpu,
)


def backend() -> Backend:
    """The backend that runs now: the default device's own kernels where they run, else MLX's own matmul.

    SPQT_BACKEND=stock asks for MLX's own matmul, to compare with.
    """
    if wished := os.environ.get("SPQT_BACKEND"):
        if wished != "stock":
            raise UsageError(f"SPQT_BACKEND={wished!r}: it can only be stock", "unset it: the device decides")
        return stock.found("asked for by SPQT_BACKEND")
    return _found()


def _found() -> Backend:
    reasons = []
    for calls in BACKENDS:
        found = calls.find()
        if isinstance(found, Backend):
            return found
        reasons += [found] if found else []
    return stock.found("; ".join(reasons) or "no other backend is for this device")


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row.
    Returns y per layer, (..., outputs) in x's dtype, and the number of active channels per layer,
    (len(layers),) uint32, which costs nothing unless somebody evaluates it.
    """
    return backend().calls.sparse_gemv(x, layers)


def sparse_rows(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """A few tokens through several projections of one input, each over its own active channels; lazy.

    x: (..., inputs) of 2 to MOST_ROWS rows. A channel's weights are read once, if any row needs them.
    Returns y per layer, (..., outputs) in x's dtype, and the active channels, (layers, rows) uint32.
    """
    return backend().calls.sparse_rows(x, layers)


def arrange(layers: Sequence[Projection]) -> None:
    """Lay the weights of projections of one input out as the backend's kernels want them.

    A layer's arrays may become other, equal ones: to be called before somebody remembers which they are.
    """
    backend().calls.arrange(layers)


def prepare(layers: Sequence[Projection]) -> Step:
    """What `sparse_gemv` does, for these layers' present arrays; a layer without threshold runs densely.

    Decoding calls it hundreds of times a token: all that does not depend on x is done here.
    """
    return backend().calls.prepare(layers)


def prepare_gated(x: mx.array, pair: Sequence[Projection], down: Projection) -> GatedStep | None:
    """down(silu(gate(x)) * up(x)) for these layers, in fewer launches than one by one.

    pair: gate and up; x: such an input as the steps will get. None if the backend has no such step.
    """
    fused = backend().fused
    return fused.prepare_gated(x, pair, down) if fused else None


def prepare_head(norm: Norm, layers: Sequence[Projection]) -> HeadStep | None:
    """norm(x) and its products for these layers, in one call; None as for `prepare_tail`."""
    fused = backend().fused
    return fused.prepare_head(norm, layers) if fused else None


def prepare_rotary(
    x: mx.array, norm: Norm, layers: Sequence[Projection], rotary: Rotary
) -> RotaryStep | None:
    """norm(x), its products q, k and v, and the rotary positions of q and k, in one call.

    x: such an input as the steps will get. None if the backend has no such step.
    """
    fused = backend().fused
    return fused.prepare_rotary(x, norm, layers, rotary) if fused else None


def prepare_tail(x: mx.array, tail: Tail) -> TailStep | None:
    """All that follows attention in a block, for its layers, in one call.

    x: such an input as the steps will get. None if the backend has no such step.
    """
    fused = backend().fused
    return fused.prepare_tail(x, tail) if fused else None


def prepare_middle(x: mx.array, middle: Middle) -> MiddleStep | None:
    """What stands between attention and a feed-forward module of another form, in one call.

    x: such an input as the steps will get. None if the backend has no such step.
    """
    fused = backend().fused
    return fused.prepare_middle(x, middle) if fused else None


def prepare_mixture(x: mx.array, mixture: Mixture) -> MixtureStep | None:
    """All that follows a mixture's norm in a block, in one call.

    x: such an input as the steps will get. None if the backend has no such step.
    """
    fused = backend().fused
    return fused.prepare_mixture(x, mixture) if fused else None


def prepare_experts(layers: Sequence[Experts]) -> ExpertsStep:
    """What an `ExpertsStep` does, for these experts' present arrays; without threshold they run densely."""
    return backend().calls.prepare_experts(layers)


def experts_matmul(x: mx.array, indices: mx.array, layer: Experts, sorted_indices: bool) -> mx.array:
    """y of x by the experts `indices`, all channels used, as mlx-lm's `SwitchLinear` computes it.

    x: (..., rows, inputs), whose leading axes are broadcast against those of indices (...). Returns (...,
    rows, outputs). sorted_indices: indices rise.
    """
    return backend().calls.experts_matmul(x, indices, layer, sorted_indices)


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """x @ W.T + bias, all channels used: x (..., inputs) -> (..., outputs). For prompts, and for many
    rows that were masked before.
    """
    return backend().calls.matmul(x, layer)


def matmul_transposed(y: mx.array, layer: Projection) -> mx.array:
    """y @ W, the gradient of `matmul` by x: y (..., outputs) -> (..., inputs); lazy."""
    return backend().calls.matmul_transposed(y, layer)
