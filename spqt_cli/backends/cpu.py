"""The CPU backend: the C++ extension `spqt_cli._cpu`, or the reason why it can't be used.

It owns the check that the extension fits the MLX that runs; it knows layers only as `interface.Projection`s
that are modules. Sources and design: cpu/.
"""

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from spqt_cli.backends import cpu_settings, stock
from spqt_cli.backends.interface import (
    Backend,
    Calls,
    Count,
    Experts,
    ExpertsStep,
    FusedCalls,
    GatedStep,
    HeadStep,
    Middle,
    MiddleStep,
    Mixture,
    MixtureStep,
    Norm,
    Rotary,
    RotaryStep,
    Step,
    Tail,
    TailStep,
    Total,
    is_token_each,
)
from spqt_cli.errors import UsageError
from spqt_cli.format import layout

_REINSTALL = "reinstall spqt (`pip install --force-reinstall --no-deps .`)"
FEW_ROWS = 64  # MOST_ROWS of cpu/job.h
MOST_NUMBERS = (1 << 31) - 1  # of an array


def status() -> tuple[bool, str]:
    """Whether the extension computes here, and why, or how to get it."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return False, "the device is a GPU"
    module, reason = _extension()
    return module is not None, reason


def find() -> Backend | str | None:
    """The CPU extension; or why it can't be used; None if the device is a GPU."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    usable, reason = status()
    if not usable:
        return reason
    this = sys.modules[__name__]
    calls, fused = cast(Calls, this), cast(FusedCalls, this)
    return Backend(
        "cpu",
        reason,
        calls,
        fused=fused,
        fused_rows=FEW_ROWS,
        native_float32=True,
        skips_experts=True,
        compensate=compensate,
    )


def sparse_gemv(x: mx.array, layers: Sequence[Any]) -> tuple[list[mx.array], mx.array]:
    """One token through several projections of one input, inactive channels skipped; lazy.

    x: (..., inputs) with exactly one row; layers: as `interface.Projection`, threshold None for dense.
    Returns y per layer, (..., outputs) in x's dtype, and active, (len(layers),) uint32.
    """
    return _native().sparse_gemv(x, [_packed(layer, layer.threshold) for layer in layers])


def sparse_rows(x: mx.array, layers: Sequence[Any]) -> tuple[list[mx.array], mx.array]:
    """As `select.sparse_rows`; a row has the same bits beside others as alone, up to FEW_ROWS of them."""
    if x.size > FEW_ROWS * x.shape[-1]:
        return stock.sparse_rows(x, layers, matmul)
    outputs, counts = _native().sparse_gemv(x, [_packed(layer, layer.threshold) for layer in layers])
    return outputs, counts[:, :-1] if counts.ndim > 1 else counts[:, None]


def prepare(layers: Sequence[Any]) -> Step:
    """As `select.prepare`: checked once, and later calls hand no weights over from Python."""
    return _native().SparseStep([_packed(layer, layer.threshold) for layer in layers])


def prepare_gated(x: mx.array, pair: Sequence[Any], down: Any) -> GatedStep | None:
    """As `select.prepare_gated`: one operation; None for another type than float32."""
    if x.dtype != mx.float32:
        return None
    packed = [_packed(layer, layer.threshold) for layer in (*pair, down)]
    return _native().GatedStep(packed[:2], packed[2])


def prepare_head(norm: Norm, layers: Sequence[Any]) -> HeadStep | None:
    """As `select.prepare_head`: one operation; None for a norm of another type than float32."""
    if norm.weight.dtype != mx.float32:
        return None
    return _native().HeadStep(norm.weight, norm.eps, [_packed(layer, layer.threshold) for layer in layers])


def prepare_experts(layers: Sequence[Any]) -> ExpertsStep:
    """As `select.prepare_experts`: one operation over all chosen experts, each as if it were alone."""
    native = _native().ExpertsStep([_packed(layer, layer.threshold) for layer in layers])

    def step(x: mx.array, indices: mx.array, counted: mx.array | None) -> tuple[list[mx.array], mx.array]:
        if x.shape[:-2] != (*indices.shape[:-1], 1):  # not the one row of a token for all its experts
            x, indices = stock.spread(x, indices)
        return native(x, indices.astype(mx.uint32), counted)

    return step


def experts_matmul(x: mx.array, indices: mx.array, layer: Experts, sorted_indices: bool) -> mx.array:
    """As `select.experts_matmul`: rows that follow one another with one expert are multiplied together."""
    x, indices = stock.spread(x, indices)
    *leading, rows, inputs = x.shape
    each = mx.broadcast_to(indices[..., None], x.shape[:-1]).reshape(-1).astype(mx.uint32)
    if not sorted_indices and each.size > 1:
        order = mx.argsort(each)
        y = _experts_matmul(x.reshape(-1, inputs)[order], each[order], layer)[mx.argsort(order)]
    else:
        y = _experts_matmul(x.reshape(-1, inputs), each, layer)
    return y.reshape(*leading, rows, layer.outputs)


def _experts_matmul(x: mx.array, each: mx.array, layer: Any) -> mx.array:
    weight, scales, biases, _, bias, *form = _packed(layer, None)
    return _native().experts_matmul(x, each, weight, scales, biases, bias, *form)


def arrange(layers: Sequence[Any]) -> None:
    """As `select.arrange`: the kernels take the arrays as they are."""


def prepare_rotary(x: mx.array, norm: Norm, layers: Sequence[Any], rotary: Rotary) -> RotaryStep | None:
    """As `select.prepare_rotary`: there is none; attention applies rotary positions itself."""
    return None


def prepare_tail(x: mx.array, tail: Tail) -> TailStep | None:
    """As `select.prepare_tail`: one operation, or two sums of several processes and what lies around them.

    None for another type than float32.
    """
    if x.dtype != mx.float32 or tail.norm.weight.dtype != mx.float32:
        return None
    if tail.total is not None:
        return _tail_of_parts(x, tail, tail.total)
    out, *pair, down = (_packed(layer, layer.threshold) for layer in (tail.out, *tail.pair, tail.down))
    return _native().TailStep(out, *tail.norm, pair, down)


def prepare_middle(x: mx.array, middle: Middle) -> MiddleStep | None:
    """As `select.prepare_middle`: one operation; None for another type than float32."""
    if x.dtype != mx.float32 or middle.norm.weight.dtype != mx.float32:
        return None
    return _native().MiddleStep(_packed(middle.out, middle.out.threshold), *middle.norm)


def prepare_mixture(x: mx.array, mixture: Mixture) -> MixtureStep | None:
    """As `select.prepare_mixture`: the module's own code calls `prepare_experts`' steps."""
    return None


def _tail_of_parts(x: mx.array, tail: Tail, total: Total) -> TailStep | None:
    out, gated = prepare([tail.out]), prepare_gated(x, tail.pair, tail.down)
    if gated is None:
        return None

    def step(attended: mx.array, x: mx.array, counted: Sequence[Count]) -> tuple[mx.array, list[Count]]:
        (y,), count = out(attended, counted[0])
        h = x + total.all(y)
        y, count_pair, count_down = gated(rms_norm(h, *tail.norm), counted[1], counted[2])
        return h + total.all(y), [count, count_pair, count_down]

    return step


def matmul(x: mx.array, layer: Any) -> mx.array:
    """x @ W.T + bias, all channels used: x (..., inputs) -> (..., outputs); lazy.

    One token of each sequence, x (sequences, 1, inputs), has the bits that it has alone; so have the rows of
    prompts, but other ones: those are sums in another order.
    """
    if x.size == x.shape[-1]:
        return _native().sparse_gemv(x, [_packed(layer, None)])[0][0]
    if x.size and is_token_each(x):
        parts = (x[at : at + FEW_ROWS] for at in range(0, x.shape[0], FEW_ROWS))
        return _joined([_native().sparse_gemv(part, [_packed(layer, None)])[0][0] for part in parts])
    weight, scales, biases, _, bias, *form = _packed(layer, None)
    return _native().zigzag_matmul(x, weight, scales, biases, bias, *form)


def head_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """x @ W.T for a matrix in MLX's own layout: a head, a tied embedding, a skipped layer; lazy.

    x: (..., inputs); weight: (outputs, inputs * bits / 32) uint32; scales, biases: (outputs, inputs /
    group_size). Returns (..., outputs) in x's dtype.
    """
    return _native().row_matmul(x, weight, scales, biases, None, bits, group_size)


def matmul_transposed(y: mx.array, layer: Any) -> mx.array:
    """As `select.matmul_transposed`: each band is a row-grouped matrix, groups along what is summed; lazy."""
    bands, inputs, _ = layer["weight"].shape
    parts = layout.banded(y, bands, layer["scales"].shape[2] * layer.group_size)
    weight, scales, biases = (layer[name] for name in ("weight", "scales", "biases"))
    form = layer.bits, layer.group_size
    products = [head_matmul(parts[b], weight[b], scales[b], biases[b], *form) for b in range(bands)]
    return sum(products[1:], products[0]).reshape(*y.shape[:-1], inputs)


def head_matmul_transposed(
    y: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """y @ W for such a matrix, the gradient of `head_matmul` by x: y (..., outputs) -> (..., inputs); lazy.

    To this product the matrix is a Zigzag layer of one band.
    """
    form = (scales.shape[1] * group_size, bits, group_size)
    return _native().zigzag_matmul(y, weight[None], scales[None], biases[None], None, *form)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis; float32, lazy."""
    return _native().rms_norm(x, weight, eps)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, of one shape, not empty; float32, lazy."""
    return _native().swiglu(gate, up)


def log_sum_exp(x: mx.array, *, last: bool, keepdims: bool) -> mx.array:
    """log(sum(exp(x))) over the last axis, or over all; float32, lazy."""
    return _native().log_sum_exp(x, last, keepdims)


def rope(  # noqa: PLR0913 - the settings of mx.fast.rope
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
) -> mx.array:
    """x (batch, heads, positions, width), float32, rotated as by `mx.fast.rope`; lazy.

    offset: of all sequences, or of each: (batch,) int32.
    """
    if freqs is not None:
        mx.eval(freqs)
    return _native().rope(x, dims, traditional, base, scale, offset, freqs)


def attends(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether `attention` covers these shapes: 4-D, equally wide heads, a multiple of 16 up to 256."""
    of_q, of_k = q.shape, k.shape  # a tuple is made at each look
    if not (len(of_q) == len(of_k) == 4 and of_k == v.shape and k.size > 0 and of_q[2] <= of_k[2]):
        return False
    width = of_q[3]
    return of_k[3] == width and width % 16 == 0 and width <= 256


def attention(  # noqa: PLR0913 - as mx.fast has it
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    causal: bool,
    mask: mx.array | None = None,
    oldest: int = 0,
) -> mx.array:
    """softmax(q @ k.T * scale) @ v, float32, lazy; causal: row i sees all but the last rows - 1 - i keys.

    q: (batch, heads, rows, width); k, v: (batch, key heads, keys, width), key heads divide heads.
    mask: for one row a head: bool (batch, 1, 1, keys), or (keys,) for all; a row's result is what it would be
    if the keys that it sees were all there are, and zeros where it sees none.
    oldest: of one row a head: the keys lie in a ring, in the order of their tokens from this one on.
    """
    return _native().attention(q, k, v, scale, causal, mask, oldest)


def prepare_token(heads: int, key_heads: int, scale: float, rope: dict[str, Any]) -> Any:
    """Attention of a token of each sequence to a cache it joins.

    Called with q, k, v, keys, values, place, padding, mask; returns what is attended, keys and values.
    rope: dims, traditional, base, scale and freqs as for `rope`. q: (..., heads * width); k, v: (...,
    key_heads * width); keys, values: (sequences, key_heads, room, width), `place` of it taken; float32.
    padding: (sequences,) int32, the places before a sequence's first token; mask: (sequences, 1, 1, place +
    1) bool; neither for one sequence alone.
    """
    if rope["freqs"] is not None:
        mx.eval(rope["freqs"])
    form = (rope[name] for name in ("dims", "traditional", "base", "scale", "freqs"))
    return _native().TokenStep(heads, key_heads, scale, *form)


def prepare_chain(blocks: Sequence[tuple[Any, Any, Any]]) -> Any:
    """Blocks that follow one another, as one operation: of each what `prepare_head`, `prepare_token` and
    `prepare_tail` gave.

    Called with x, of each block keys, values and place, counts, (7 * blocks,) uint32 of q, k, v, o, gate, up
    and down of each, or None, and of a batch each block's padding, and the mask, or None; returns of each y,
    keys and values, and counts. See `prepare_token`; of several rows counts are (7 * blocks, rows + 1). Its
    `takes` says of x, keys, values, places and a batch whether it covers them. None for blocks that do not
    fit together, or whose weights are not there yet.
    """
    try:
        return _native().ChainStep(list(blocks))
    except ValueError:
        return None


def identity(a: mx.array) -> int:
    """What tells an array's value now from the one after a change in place."""
    found: int = _native().identity(a)
    return found


def held(arrays: list[mx.array]) -> list[mx.array]:
    """The same arrays as other objects, which keep what these are now, whatever is done to them in place."""
    found: list[mx.array] = _native().held(arrays)
    return found


def same(dicts: list[dict[str, Any]], keys: list[str], values: list[Any]) -> bool:
    """Whether each dictionary has the very value at its key, or nothing where that is None."""
    found: bool = _native().same(dicts, keys, values)
    return found


def takes_token(x: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether a step of `prepare_token` covers this x and cache: float32, equal heads of 16 to 256 values."""
    shape = keys.shape
    even = shape == values.shape and shape[3] % 16 == 0 and 0 < shape[3] <= 256
    return even and x.size == shape[0] * x.shape[-1] and x.dtype == keys.dtype == values.dtype == mx.float32


def compensate(
    target: Any, factor: np.ndarray, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error-compensating rounding as `fit.compensate` defines it; the same bits for all instruction sets.

    target: (inputs, columns), of numpy or MLX, columns in whole groups; factor: (inputs, inputs), unit
    upper triangular; float32. Returns codes (inputs, columns) uint8, and scales and biases (inputs, groups)
    float32 that are exact in dtype, NaN where none is finite.
    """
    inputs, columns = target.shape
    groups = columns // group_size
    # targets first, then written over by errors
    errors = np.asarray(target).reshape(inputs, groups, group_size).swapaxes(0, 1).copy()
    codes = np.empty(errors.shape, np.uint8)
    scales, biases = np.empty((2, groups, inputs), np.float32)
    kind = (mx.float32, mx.float16, mx.bfloat16).index(dtype)
    _native().compensate(errors, np.ascontiguousarray(factor), bits, kind, codes, scales, biases)
    return codes.swapaxes(0, 1).reshape(inputs, columns), scales.T, biases.T


def slopes(
    dy: np.ndarray, x: np.ndarray, w: np.ndarray, group_size: int, *, alone: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The way back through a layer: slopes by its inputs, and those that scales of its groups need.

    dy: (rows, bands * band), slopes by the outputs; x: (rows, inputs); w: (bands, inputs, band), columns in
    whole groups; float32. Returns dx (rows, inputs), sums of dy * w over outputs, and dots (bands, inputs,
    band / group_size), sums of x * dy * w over rows and a group's outputs; float32, the same bits for any
    threads. alone: the calling thread computes everything itself, for callers that share the machine.
    Raises ValueError for shapes that do not fit.
    """
    (rows, _), (_, inputs), (bands, _, band) = dy.shape, x.shape, w.shape
    dx = np.empty((rows, inputs), np.float32)
    dots = np.empty((bands, inputs, band // max(group_size, 1)), np.float32)
    _native().slopes(dy, x, w, group_size, alone, dx, dots)
    return dx, dots


def threads() -> int:
    """The number of threads that work on one operation."""
    return _native().threads()


def set_threads(count: int) -> None:
    """Use `count` threads from the next operation on; at least 1."""
    if count < 1:
        raise UsageError(f"{count} threads", "use at least 1")
    _native().set_threads(count)


def isas() -> list[str]:
    """The instruction sets that kernels were built for and that this machine can execute, widest first."""
    return _native().isas() if status()[0] else []


def _packed(layer: Any, threshold: mx.array | None) -> tuple[Any, ...]:
    # by key: reading an attribute of an nn.Module is a Python call, and this runs 200 times a token
    return (
        layer["weight"],
        layer["scales"],
        layer["biases"],
        threshold,
        layer.get("bias"),
        layer.outputs,
        layer.bits,
        layer.group_size,
    )


def _native() -> Any:
    module, reason = _extension()
    if module is None:
        raise RuntimeError(f"the CPU extension is not usable: {reason}")  # callers ask status() first
    return module


@cache
def _extension() -> tuple[Any, str]:
    """The extension once it has proved itself, or None; and the reason."""
    try:
        module = importlib.import_module("spqt_cli._cpu")
    except ModuleNotFoundError:
        return None, f"it was not built: install a C++ compiler (apt: g++ python3-dev), then {_REINSTALL}"
    except ImportError as error:
        return None, f"it does not load ({error}): {_REINSTALL}"
    built, running = module.mlx_version(), module.running_mlx_version()
    if built != running:
        return None, f"it was built for MLX {built}, but {running} runs: {_REINSTALL}"
    cpu_settings.choose_isa(module)
    if fault := _smoke_fault(module):
        return None, f"it fails on this machine ({fault}): {_REINSTALL}"
    module.set_threads(cpu_settings.default_threads())
    return module, f"{module.isa()} kernels, {module.threads()} threads"


def _smoke_fault(module: Any) -> str:
    """What goes wrong in one small call, or nothing; a foreign MLX fails in the call, not at import."""
    weight = mx.full((1, 1, 4), 0x11111111, dtype=mx.uint32)
    ones = mx.ones((1, 1, 1))
    x = mx.array([3.0])
    try:
        (y,), active = module.sparse_gemv(x, [(weight, ones, ones, None, None, 32, 4, 32)])
        right = bool((y == 6).all().item()) and active.item() == 1  # 3 * (1 * 1 + 1)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "" if right else "wrong numbers"
