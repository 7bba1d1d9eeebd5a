"""Rotary positions for kernels that turn heads themselves: the cosines and sines of each position.

They are made with MLX for many positions at once: a kernel's own sines would differ between machines.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.backends.interface import Rotary
from spqt_cli.decode import attention_cpu

BLOCK = 256  # positions made at one time


class Turns:
    """The turns of positions, (dims,) float32 each: cosines of a head's angles, then sines.

    frequencies: radians per position of each pair, (dims / 2,).
    """

    def __init__(self, frequencies: tuple[float, ...]) -> None:
        self.frequencies = mx.array(frequencies, dtype=mx.float32)
        self._first = -BLOCK
        self._rows: list[mx.array] = []

    def at(self, offset: int) -> mx.array:
        """The turns of one position."""
        row = offset - self._first
        if not 0 <= row < BLOCK:
            self._first, row = offset - offset % BLOCK, offset % BLOCK
            positions = mx.arange(self._first, self._first + BLOCK, dtype=mx.float32)
            angles = positions[:, None] * self.frequencies
            table = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=1)
            self._rows = [one.reshape(-1) for one in mx.split(table, BLOCK)]
            mx.eval(self._rows)
        return self._rows[row]


def form_of(module: Any) -> tuple[Rotary, Turns] | None:
    """How an attention module turns q and k, if that and the product are all that it does."""
    kind: type = type(module)
    form = attention_cpu.rope_form(module["rope"]) if attention_cpu.is_plain(kind) else None
    if form is None:
        return None
    dims, base, freqs = form["dims"], form["base"], form["freqs"]
    if freqs is None:
        per_position = float(base) ** (-np.arange(0, dims, 2) / dims)
    else:
        per_position = 1.0 / np.array(freqs.astype(mx.float32)).astype(np.float64)
    head = module["q_proj"].outputs // module.n_heads
    turned = Rotary(head, dims, traditional=bool(form["traditional"]), rotated=2)
    return turned, _shared(tuple((form["scale"] * per_position).tolist()))


@cache
def _shared(frequencies: tuple[float, ...]) -> Turns:
    """One object for all blocks that turn alike: a step then looks its position up once."""
    return Turns(frequencies)
