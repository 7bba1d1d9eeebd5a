"""Integers out of bit streams, and numbers out of integers; lazily and in pieces of rows.

A tensor's whole is never held wider than it is stored and as its result: see `by_rows`.
"""

from collections.abc import Callable

import mlx.core as mx

AT_ONCE = 1 << 18  # weights that are widened together
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1


def by_rows(
    stored: mx.array,
    shape: tuple[int, int],
    make: Callable[[mx.array, int, int], mx.array],
    multiple: int = 1,
) -> mx.array:
    """make(stored, first, last) for consecutive rows of a result of this shape, joined along the first axis.

    Each piece waits for the one before: MLX would begin many, and hold what lies between. multiple: every
    piece but the last has a multiple of so many rows.
    """
    rows, columns = shape
    step = max(1, AT_ONCE // max(columns, 1) // multiple) * multiple
    pieces: list[mx.array] = []
    for first in range(0, rows, step):
        turn = mx.depends([stored], pieces[-1:])[0] if pieces else stored
        pieces.append(make(turn, first, min(first + step, rows)))
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


def unpack(words: mx.array, bits: int, count: int) -> mx.array:
    """The first `count` integers of each row, uint8 (rows, count).

    words: (rows, n) of 32 bits, each row one stream of `bits`-bit integers, lowest bits first.
    """
    rows, width = words.shape
    words = mx.contiguous(words).view(mx.uint32)
    if 8 % bits == 0:
        stream = words.view(mx.uint8)
        if bits == 8:
            return stream[:, :count]
        shifts = mx.arange(0, 8, bits, dtype=mx.uint8)
        return ((stream[..., None] >> shifts) & ((1 << bits) - 1)).reshape(rows, -1)[:, :count]
    if width % bits:
        words = mx.pad(words, [(0, 0), (0, -width % bits)])
    groups = words.reshape(rows, -1, bits)  # 32 integers in `bits` words
    found = []
    for start in range(0, 32 * bits, bits):
        word, offset = divmod(start, 32)
        value = groups[..., word] >> offset
        if offset + bits > 32:
            value = value | (groups[..., word + 1] << (32 - offset))
        found.append((value & ((1 << bits) - 1)).astype(mx.uint8))
    return mx.stack(found, axis=-1).reshape(rows, -1)[:, :count]


def widen(
    codes: mx.array, scales: mx.array, zeros: mx.array | int, dtype: mx.Dtype, g_idx: mx.array | None = None
) -> mx.array:
    """(codes - zeros) * scales as `dtype`, (rows, columns).

    codes: integers (rows, columns). scales, zeros: (rows, groups); groups are consecutive columns, or
    with g_idx (columns,) the group of each. Exact but for the last rounding: in float32 a product of a
    16-bit scale and an 8-bit integer loses nothing. A group that does not exist gives NaN.
    """
    rows, columns = codes.shape
    wide = scales.astype(mx.float32)
    if g_idx is None:
        parts = codes.reshape(rows, wide.shape[1], -1).astype(mx.float32)
        offset = zeros if isinstance(zeros, int) else zeros[..., None]
        return ((parts - offset) * wide[..., None]).astype(dtype).reshape(rows, columns)
    groups = wide.shape[1]
    exists = mx.where((g_idx >= 0) & (g_idx < groups), 1.0, mx.nan)  # an index out of range gives NaN
    index = mx.clip(g_idx, 0, groups - 1)
    offset = zeros if isinstance(zeros, int) else zeros[:, index]
    return ((codes.astype(mx.float32) - offset) * (wide[:, index] * exists)).astype(dtype)


def fp4(packed: mx.array) -> mx.array:
    """float32 values of bytes of two E2M1 numbers, the first in the low half; the last axis doubles."""
    pairs = mx.stack([packed & 15, packed >> 4], axis=-1)
    return mx.take(mx.array(FP4), pairs.reshape(*packed.shape[:-1], -1))


def exponents(scales: mx.array) -> mx.array:
    """float32 powers of two of E8M0 bytes; 255 is NaN."""
    bits = scales.astype(mx.uint32) << 23
    subnormal = mx.array(0x00400000, mx.uint32)  # 0 stands for 2**-127
    wide = mx.where(scales == 0, subnormal, bits).view(mx.float32)
    return mx.where(scales == 255, mx.nan, wide)
