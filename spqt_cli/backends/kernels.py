"""Which backend multiplies, and the calls that do it.

The operation is `layout.matmul(layout.mask(x, threshold), ...)`; every backend computes exactly that.
`backend.py` holds the Metal and CUDA kernels, `cpu.py` the C++ extension, `stock.py` MLX's own matmul.
"""

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from spqt_cli.backends import stock
from spqt_cli.backends.gpu.kernel_text import Rotary
from spqt_cli.errors import UsageError


class Projection(Protocol):
    """What a backend reads of a Zigzag layer.

    weight, scales, biases: as `layout.quantize` returns them; bias: (outputs,) or None;
    threshold: (1,) or (inputs,), float32.
    """

    weight: mx.array
    scales: mx.array
    biases: Any  # mx.array; MLX declares it optional, which it is in other quantization modes
    outputs: int
    bits: int
    group_size: int

    @property
    def threshold(self) -> Any: ...

    def get(self, key: str, default: Any = None) -> Any: ...


Count = mx.array | None  # of active channels, (layers,) uint32; None where nobody counts


class Step(Protocol):
    """One token through projections of one input: x (..., inputs), one row -> y of each, and counts.

    counts: (layers,) uint32, `counted` plus the channels active now. Where `counted` is None nobody counts,
    and counts may be None too.
    """

    def __call__(
        self, x: mx.array, counted: Count, /
    ) -> tuple[list[mx.array], Count]: ...  # pragma: no cover


class GatedStep(Protocol):
    """One token through down(silu(gate) * up): x, one row -> y, and the counts of gate and up, and of down.

    Counts are as in `Step`.
    """

    def __call__(
        self, x: mx.array, counted: Count, counted_down: Count, /
    ) -> tuple[mx.array, Count, Count]: ...  # pragma: no cover


class Norm(NamedTuple):
    """An RMS normalization. weight: (inputs,)."""

    weight: mx.array
    eps: float


class Tail(NamedTuple):
    """What follows attention in a block: h = x + out(attended), y = h + down(silu(gate) * up of norm(h))."""

    out: Projection
    norm: Norm
    pair: Sequence[Projection]  # gate and up
    down: Projection


class HeadStep(Protocol):
    """One token through a norm and projections of its result: x -> norm(x), y of each, and counts."""

    def __call__(
        self, x: mx.array, counted: Count, /
    ) -> tuple[mx.array, list[mx.array], Count]: ...  # pragma: no cover


class RotaryStep(Protocol):
    """One token through a norm, q/k/v and the rotary turns of q and k: x, one row, and turns -> q, k, v and
    counts; q, k, v: (1, heads, 1, width).

    turns: (dims,) float32: the cosines of a position's angles, then the sines.
    """

    def __call__(
        self, x: mx.array, turns: mx.array, counted: Count, /
    ) -> tuple[list[mx.array], Count]: ...  # pragma: no cover


class TailStep(Protocol):
    """One token through a `Tail`: attended and x, one row each -> y, and counts.

    Counts, as in `Step`, are a list: of out, of gate and up, of down.
    """

    def __call__(
        self, attended: mx.array, x: mx.array, counted: Sequence[Count], /
    ) -> tuple[mx.array, Sequence[Count]]: ...  # pragma: no cover


class Backend(NamedTuple):
    name: str  # metal, cuda, cpu or stock
    reason: str  # why this one, for people


@cache
def backend() -> Backend:
    """The backend of this process, chosen once: the default device's own kernels where they run.

    SPQT_BACKEND=stock asks for MLX's own matmul, to compare with.
    """
    if wished := os.environ.get("SPQT_BACKEND"):
        if wished != "stock":
            raise UsageError(f"SPQT_BACKEND={wished!r}: it can only be stock", "unset it: the device decides")
        return Backend("stock", "asked for by SPQT_BACKEND")
    if mx.default_device().type == mx.DeviceType.gpu:
        from spqt_cli.backends.gpu import backend as gpu

        name, reason = gpu.status()
        return Backend(name or "stock", reason)
    from spqt_cli.backends import cpu

    usable, reason = cpu.status()
    return Backend("cpu" if usable else "stock", reason)


def counted_steps() -> int:
    """Of how many decode steps one is counted while generating.

    On a GPU counts are handed from step to step by the host, which there is the slower of the two.
    """
    return 8 if on_gpu() else 1


def on_gpu() -> bool:
    """Whether our own kernels run on a GPU."""
    return backend().name in ("metal", "cuda")


@cache
def _implementation() -> ModuleType:
    name = backend().name
    if name == "cpu":
        from spqt_cli.backends import cpu

        return cpu
    if name in ("metal", "cuda"):
        from spqt_cli.backends.gpu import backend as gpu

        return gpu
    return stock


def sparse_gemv(x: mx.array, layers: Sequence[Projection]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row.
    Returns y per layer, (..., outputs) in x's dtype, and the number of active channels per layer,
    (len(layers),) uint32, which costs nothing unless somebody evaluates it.
    """
    return _implementation().sparse_gemv(x, layers)


def arrange(layers: Sequence[Projection]) -> None:
    """Lay the weights of projections of one input out as the backend's kernels want them.

    A layer's arrays may become other, equal ones: to be called before somebody remembers which they are.
    """
    if on_gpu():
        _implementation().arrange(layers)


def prepare(layers: Sequence[Projection]) -> Step:
    """What `sparse_gemv` does, for these layers as they are now; a layer without threshold runs densely.

    Decoding calls it hundreds of times a token: all that does not depend on x is done here.
    """
    return _implementation().prepare(layers)


def prepare_gated(x: mx.array, pair: Sequence[Projection], down: Projection) -> GatedStep | None:
    """down(silu(gate(x)) * up(x)) for these layers as they are now, in fewer launches than one by one.

    pair: gate and up; x: such an input as the steps will get. None where the backend has no such step.
    """
    implementation = _implementation()
    return implementation.prepare_gated(x, pair, down) if backend().name != "stock" else None


def prepare_head(norm: Norm, layers: Sequence[Projection]) -> HeadStep | None:
    """norm(x) and its products for these layers as they are now, in one call; None as for `prepare_tail`."""
    implementation = _implementation()
    return implementation.prepare_head(norm, layers) if backend().name != "stock" else None


def prepare_rotary(
    x: mx.array, norm: Norm, layers: Sequence[Projection], rotary: Rotary
) -> RotaryStep | None:
    """norm(x), its products q, k and v, and q's and k's heads turned, in one call.

    x: such an input as the steps will get. None where the backend has no such step.
    """
    return _implementation().prepare_rotary(x, norm, layers, rotary) if on_gpu() else None


def prepare_tail(x: mx.array, tail: Tail) -> TailStep | None:
    """All that follows attention in a block, for its layers as they are now, in one call.

    x: such an input as the steps will get. None where the backend has no such step.
    """
    implementation = _implementation()
    return implementation.prepare_tail(x, tail) if backend().name != "stock" else None


def matmul(x: mx.array, layer: Projection) -> mx.array:
    """x @ W.T + bias, all channels used: x (..., inputs) -> (..., outputs). For prompts, and for many
    rows that were masked before.
    """
    return _implementation().matmul(x, layer)
