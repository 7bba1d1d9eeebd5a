"""Packs and unpacks the Zigzag layout: groups along the outputs, bands of outputs stored one after another.

The only file that knows the order of weights. Band `b` holds outputs `b * band` to `(b + 1) * band`;
`weight[b, k]` is the packed chunk of input channel `k` in that band, contiguous and so skippable.
The experts of a mixture are such matrices one after another: `weight[e, b, k]`.
It knows nothing of models, files or devices.

Source: the Zigzag layout of arXiv 2511.04477, section 4, with a band wider than one group.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.errors import UsageError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MAX_BAND = 8192  # outputs: as wide as paid on CPU and GPU (metal/README.md has the sweep)
MIN_BAND = 1024  # outputs: below this the lines of scales are hardly ever skipped


def is_packable(bits: Any, group_size: Any) -> bool:
    """Whether MLX packs such a quantization; False for what is no integer."""
    return type(bits) is type(group_size) is int and bits in BITS and group_size in GROUP_SIZES


def check(bits: int | None, group_size: int | None) -> None:
    """Refuse (exit 2) bits or a group size that MLX does not pack; None stands for a default and passes."""
    if bits is not None and bits not in BITS:
        raise UsageError(f"{bits} bits: not a width that MLX packs", f"use one of {BITS}")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise UsageError(f"group size {group_size} does not exist", f"use one of {GROUP_SIZES}")


def band_of(outputs: int, group_size: int) -> int:
    """The number of consecutive outputs stored together, for a layer of `outputs` rows."""
    groups = -(-outputs // group_size)
    rows = groups * group_size
    fits = [d for d in range(1, groups + 1) if groups % d == 0 and d * group_size <= MAX_BAND]
    band = max(fits, default=1) * group_size
    if band >= min(rows, MIN_BAND):
        return band
    bands = -(-rows // MAX_BAND)
    return -(-groups // bands) * group_size


def packed_shapes(
    shape: Sequence[int], bits: int, group_size: int, band: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `weight` (uint32) and of `scales` and `biases` for a matrix (outputs, inputs), or for
    experts (experts, outputs, inputs).
    """
    *experts, outputs, inputs = shape
    bands = -(-outputs // band)
    return (*experts, bands, inputs, band * bits // 32), (*experts, bands, inputs, band // group_size)


def quantize(w: mx.array, bits: int, group_size: int, band: int) -> tuple[mx.array, mx.array, mx.array]:
    """The packed `weight`, `scales` and `biases` of a matrix, or of experts; lazy.

    w: (outputs, inputs), floating; of experts (experts, outputs, inputs), and so are the results' first axes.
    weight: (bands, inputs, band * bits / 32), uint32.
    scales, biases: (bands, inputs, band / group_size), w's dtype; w ~ code * scale + bias.
    Rows that fill the last band repeat the last output, which leaves every group's range as it was.
    """
    *experts, outputs, inputs = w.shape
    bands = -(-outputs // band)
    if missing := bands * band - outputs:
        repeated = mx.broadcast_to(w[..., -1:, :], (*experts, missing, inputs))
        w = mx.concatenate([w, repeated], axis=-2)
    return quantize_rows(w.reshape(*experts, bands, band, inputs).swapaxes(-1, -2), bits, group_size)


def quantize_rows(w: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """What `mx.quantize` gives for w, (..., columns), whose columns form the groups; lazy.

    MLX's CUDA build (seen in 0.32.4) takes a transposed matrix for one that lies in rows, and its codes
    are of nothing then.
    """
    weight, scales, biases = mx.quantize(mx.contiguous(w), group_size=group_size, bits=bits)
    return weight, scales, biases


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as `mx.quantize` packs them: (..., n) uint8, n in 32s -> (..., n * bits / 32) uint32."""
    if 8 % bits == 0:
        apart = [codes[..., i :: 8 // bits] << np.uint8(bits * i) for i in range(8 // bits)]
        return np.ascontiguousarray(np.bitwise_or.reduce(apart)).view("<u4")
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], "<u8")
    for i in range(8):  # eight codes fill `bits` bytes
        words |= eights[..., i].astype("<u8") << np.uint64(bits * i)
    used = np.ascontiguousarray(words[..., None].view(np.uint8)[..., :bits])
    return used.reshape(*codes.shape[:-1], -1).view("<u4")


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, *, outputs: int, bits: int, group_size: int
) -> mx.array:
    """The matrix (outputs, inputs), or experts (experts, outputs, inputs), that packed arrays stand for, in
    the dtype of `scales`.
    """
    w = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits).swapaxes(-1, -2)
    return w.reshape(*weight.shape[:-3], -1, weight.shape[-2])[..., :outputs, :]


def take_groups(packed: mx.array, groups: Sequence[range], in_band: int, in_new: int) -> mx.array:
    """Some groups of outputs, in their order, as bands of `in_new` groups; lazy, and no view of the whole.

    packed: `weight`, `scales` or `biases`, (..., bands, inputs, columns), `in_band` groups in a band. Groups
    that fill the last new band repeat the last one. Returns (..., new bands, inputs, new columns).
    """
    *leading, _, inputs, columns = packed.shape
    first, last = min(one.start for one in groups), max(one.stop for one in groups)
    skipped = first // in_band
    packed = packed[..., skipped : -(-last // in_band), :, :]
    if in_new == in_band and len(groups) == 1 and first % in_band == 0 and len(groups[0]) % in_band == 0:
        return mx.contiguous(packed)
    width = columns // in_band
    chunks = packed.reshape(*packed.shape[:-1], in_band, width).swapaxes(-2, -3)
    chunks = chunks.reshape(*leading, -1, inputs, width)
    wanted = [number - skipped * in_band for one in groups for number in one]
    wanted += wanted[-1:] * (-len(wanted) % in_new)
    chunks = mx.take(chunks, mx.array(wanted), axis=-3).reshape(*leading, -1, in_new, inputs, width)
    return mx.contiguous(chunks.swapaxes(-2, -3).reshape(*leading, -1, inputs, in_new * width))


def take_inputs(packed: mx.array, inputs: Sequence[range]) -> mx.array:
    """Some input channels of `weight`, `scales` or `biases`, in their order; lazy, no view of the whole."""
    parts = [packed[..., one.start : one.stop, :] for one in inputs]
    return mx.contiguous(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2))


def matmul(  # noqa: PLR0913 - the parameters of mx.quantized_matmul
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    outputs: int,
    bits: int,
    group_size: int,
) -> mx.array:
    """x @ W.T by MLX's own kernel: x (..., inputs) -> (..., outputs)."""
    bands, inputs, _ = weight.shape
    rows = x.reshape(1, -1, inputs)  # 3-D: a 2-D x would meet only band 0
    y = mx.quantized_matmul(
        rows, weight, scales, biases, transpose=False, group_size=group_size, bits=bits
    )  # (bands, rows, band)
    if bands > 1:
        y = y.swapaxes(0, 1)
    return y.reshape(rows.shape[1], -1)[:, :outputs].reshape(*x.shape[:-1], outputs)


def banded(y: mx.array, bands: int, band: int) -> mx.array:
    """y (..., outputs) as bands hold outputs: (bands, rows, band), zeros where the last one is not full."""
    rows = y.reshape(-1, y.shape[-1])
    if missing := bands * band - y.shape[-1]:
        rows = mx.pad(rows, [(0, 0), (0, missing)])
    return rows.reshape(-1, bands, band).swapaxes(0, 1)


def matmul_transposed(
    y: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    """y @ W by MLX's own kernel, the gradient of `matmul` by its x: y (..., outputs) -> (..., inputs).

    A band is a row-grouped matrix to this product: its groups lie along what is summed.
    """
    bands, inputs, _ = weight.shape
    parts = banded(y, bands, scales.shape[2] * group_size)
    x = mx.quantized_matmul(
        parts, weight, scales, biases, transpose=True, group_size=group_size, bits=bits
    )  # (bands, rows, inputs)
    return x.sum(axis=0).reshape(*y.shape[:-1], inputs)


def gather_matmul(  # noqa: PLR0913 - the parameters of mx.gather_qmm
    x: mx.array,
    indices: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    outputs: int,
    bits: int,
    group_size: int,
    sorted_indices: bool = False,
) -> mx.array:
    """x @ W[indices].T by MLX's own kernel, as mlx-lm's `SwitchLinear` computes it.

    x: (..., rows, inputs), whose leading axes are broadcast against those of indices, (...) whole numbers.
    weight, scales, biases: of experts. Returns (..., rows, outputs). sorted_indices: indices rise.
    """
    experts, bands, *_ = weight.shape
    w, s, b = (array.reshape(experts * bands, *array.shape[2:]) for array in (weight, scales, biases))
    form: dict[str, Any] = {"group_size": group_size, "bits": bits, "sorted_indices": sorted_indices}
    parts = [  # band by band: so indices stay sorted
        mx.gather_qmm(x, w, s, b, rhs_indices=indices * bands + band, transpose=False, **form)
        for band in range(bands)
    ]
    y = parts[0] if bands == 1 else mx.concatenate(parts, axis=-1)
    return y[..., :outputs]


def mask(x: mx.array, threshold: mx.array) -> mx.array:
    """x with its inactive channels set to zero.

    A channel is active when not (|x| < threshold) in float32: threshold 0 keeps every channel and
    NaN is active. x: (..., inputs); threshold: (1,) or (inputs,), float32.
    """
    return mx.where(inactive(x, threshold), mx.array(0, x.dtype), x)


def inactive(x: mx.array, threshold: mx.array) -> mx.array:
    """True where a channel is skipped; x's shape, bool. All backends compare exactly like this."""
    return mx.abs(x.astype(mx.float32)) < threshold
