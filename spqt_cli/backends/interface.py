"""What a backend is asked for, and what it says it can: the types that all of them share.

The operation is `layout.matmul(layout.mask(x, threshold), ...)`; every backend computes exactly that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx


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


class Experts(Projection, Protocol):
    """What a backend reads of a mixture's experts: a `Projection` whose arrays have one more axis in front.

    weight, scales, biases: (experts, bands, inputs, ...); bias: (experts, outputs) or None. One threshold.
    """


Count = mx.array | None  # of active channels, (layers,) uint32; None if nothing is counted


def is_token_each(x: mx.array) -> bool:
    """Whether x, (sequences, 1, width), is one token of each of some sequences."""
    return x.ndim == 3 and x.shape[1] == 1


class Step(Protocol):
    """One token through projections of one input: x (..., inputs), one row -> y of each, and counts.

    counts: (layers,) uint32, `counted` plus the channels active now. If `counted` is None nothing is counted,
    and counts may be None too. Where the backend's `fused_rows` is more than 1, a step takes up to so many
    rows; counts of several are (layers, rows + 1), the last being the channels that were read.
    """

    def __call__(
        self, x: mx.array, counted: Count, /
    ) -> tuple[list[mx.array], Count]: ...  # pragma: no cover


class ExpertsStep(Protocol):
    """Few tokens through the experts chosen for each, of projections of one input: x (..., 1, inputs), whose
    leading axes are broadcast against those of indices (...) -> y of each, (..., 1, outputs), and counts.

    counts: (layers,) uint32, `counted` plus the active channels of all pairs of a token and an expert. If
    `counted` is None nothing is counted, and counts may be None too.
    """

    def __call__(
        self, x: mx.array, indices: mx.array, counted: Count, /
    ) -> tuple[list[mx.array], Count]: ...  # pragma: no cover


def pairs(x: mx.array, indices: mx.array) -> int:
    """How many products of a row and an expert an `ExpertsStep` makes of its arguments."""
    return max(indices.size, x.size // x.shape[-1])


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


class Total(NamedTuple):
    """Adds up what several processes computed, each of its part of the inputs.

    all: y, of any shape -> the sum over them. is_first: this process adds what is to be added once.
    """

    all: Callable[[mx.array], mx.array]
    is_first: bool


class Tail(NamedTuple):
    """What follows attention in a block: h = x + out(attended), y = h + down(silu(gate) * up of norm(h)).

    total: adds up the products of out, and of down, where several processes have a part each.
    """

    out: Projection
    norm: Norm
    pair: Sequence[Projection]  # gate and up
    down: Projection
    total: Total | None = None


class Middle(NamedTuple):
    """What follows attention, up to a feed-forward module of another form: h = x + out(attended), norm(h)."""

    out: Projection
    norm: Norm


class Mixture(NamedTuple):
    """A mixture of experts whose router's numbers decide: y = sum of weight * down(silu(gate) * up) over the
    `chosen` experts with the largest, weights being the softmax of these, or with of_all that of all.

    router: normed -> the numbers, (..., experts). pair: gate and up.
    """

    router: Callable[[mx.array], mx.array]
    pair: "Sequence[Experts]"
    down: "Experts"
    chosen: int
    of_all: bool


class MixtureStep(Protocol):
    """One token through a `Mixture`: h and normed, one row each -> h + y, and counts.

    Counts, as in `Step`, are a list: of gate and up, of down; each over all chosen experts.
    """

    def __call__(
        self, h: mx.array, normed: mx.array, counted: Sequence[Count], /
    ) -> tuple[mx.array, Sequence[Count]]: ...  # pragma: no cover


class HeadStep(Protocol):
    """One token through a norm and projections of its result: x -> norm(x), y of each, and counts."""

    def __call__(
        self, x: mx.array, counted: Count, /
    ) -> tuple[mx.array, list[mx.array], Count]: ...  # pragma: no cover


class RotaryStep(Protocol):
    """One token through a norm, q/k/v and rotary positions of q and k: x, one row, and turns -> q, k, v and
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


class MiddleStep(Protocol):
    """One token through a `Middle`: attended and x, one row each -> h and norm(h), and the count of out.

    The count, as in `Step`, is in a list.
    """

    def __call__(
        self, attended: mx.array, x: mx.array, counted: Sequence[Count], /
    ) -> tuple[tuple[mx.array, mx.array], Sequence[Count]]: ...  # pragma: no cover


class Rotary(NamedTuple):
    """How heads are rotated by a position: rotary embeddings of the first `rotated` projections.

    head: outputs of a head, of which `dims` are turned; traditional: pairs of neighbours, else of halves.
    """

    head: int
    dims: int
    traditional: bool
    rotated: int


class Calls(Protocol):
    """The functions that every backend has, as a module or an object; `select` says what each returns."""

    def find(self) -> "Backend | str | None":
        """This backend; why its kernels can't run on this device; or None: a device of another kind."""
        ...  # pragma: no cover

    def sparse_gemv(
        self, x: mx.array, layers: Sequence[Projection], /
    ) -> tuple[list[mx.array], mx.array]: ...
    def sparse_rows(
        self, x: mx.array, layers: Sequence[Projection], /
    ) -> tuple[list[mx.array], mx.array]: ...
    def matmul(self, x: mx.array, layer: Projection, /) -> mx.array: ...
    def matmul_transposed(self, y: mx.array, layer: Projection, /) -> mx.array: ...
    def arrange(self, layers: Sequence[Projection], /) -> None: ...
    def prepare(self, layers: Sequence[Projection], /) -> Step: ...
    def prepare_experts(self, layers: Sequence[Experts], /) -> ExpertsStep: ...
    def experts_matmul(
        self, x: mx.array, indices: mx.array, layer: Experts, sorted_indices: bool, /
    ) -> mx.array: ...


class FusedCalls(Protocol):
    """Steps of more than one product; each answers None for layers or inputs that it does not cover."""

    def prepare_gated(
        self, x: mx.array, pair: Sequence[Projection], down: Projection, /
    ) -> GatedStep | None: ...
    def prepare_head(self, norm: Norm, layers: Sequence[Projection], /) -> HeadStep | None: ...
    def prepare_rotary(
        self, x: mx.array, norm: Norm, layers: Sequence[Projection], rotary: Rotary, /
    ) -> RotaryStep | None: ...
    def prepare_tail(self, x: mx.array, tail: Tail, /) -> TailStep | None: ...
    def prepare_middle(self, x: mx.array, middle: Middle, /) -> MiddleStep | None: ...
    def prepare_mixture(self, x: mx.array, mixture: Mixture, /) -> MixtureStep | None: ...


@dataclass(frozen=True)
class Backend:
    """One way to multiply, as it runs here, and what it can: nobody compares its name.

    name: metal, cuda, cpu or stock, for reports. reason: why this one, in one line. calls: multiplies.
    fused: its steps of more than one product, if it has some. fused_rows: how many rows a step takes.
    count_every: of how many decode steps one is counted; where the host is slower than the device, counting
    each costs speed. traces: steps around attention are traced into few launches, so that a fused block pays.
    native_float32: it also replaces MLX's CPU norms, rotary positions and attention, in float32, and reads
    16-bit scales as they are.
    sums_in_half: float16 products are added up in float16, so that only float32 can be judged.
    skips_experts: of chosen experts its kernels read the active channels alone; else all are read.
    compensate: its kernel for error-compensating rounding, if it has one. many_rows: says how it multiplies
    many rows, a line for each kind of layer; where that is measured, it measures. check: where kernels are
    compiled as they are used, compiles and checks those for groups of layers that run in one launch, and says
    which kernels are not used in this process, a line each.
    """

    name: str
    reason: str
    calls: Calls
    fused: FusedCalls | None = None
    fused_rows: int = 1
    count_every: int = 1
    traces: bool = False
    native_float32: bool = False
    sums_in_half: bool = False
    skips_experts: bool = False
    compensate: Callable[..., Any] | None = None
    many_rows: Callable[[], list[str]] | None = None
    check: Callable[[Sequence[Sequence[Any]]], list[str]] | None = None
