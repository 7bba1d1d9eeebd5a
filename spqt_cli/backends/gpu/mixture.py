"""The ends of a mixture's step on a GPU: which experts a token is sent to, and the sum of what they give.

MLX's softmax, sort, gathering, division, product and sum are eight launches of a microsecond's work each.
"""

from typing import NamedTuple

import mlx.core as mx

from spqt_cli.backends.gpu import geometry, kernel_text
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.launch import TYPES, Launch, in_rows

LEAST, MOST = 8, 1024  # experts; MLX hands a smaller array to Metal in another address space
MOST_CHOSEN = 32
ADD_THREADS = 128


class Ends(NamedTuple):
    """The launches around the experts', of choose_experts.metal and add_experts.metal. of_all: as there."""

    choose: Launch
    add: Launch
    of_all: bool


def ends(x: mx.array, logits: mx.array, chosen: int, *, of_all: bool) -> Ends | None:
    """For such x (..., width) and logits (..., experts) of one row; None where the kernels can't."""
    count = logits.shape[-1]
    if not (LEAST <= count <= MOST and 0 < chosen <= min(count, MOST_CHOSEN) and x.shape[-1] >= LEAST):
        return None
    threads = min(MOST, -(-count // geometry.SIMD) * geometry.SIMD)
    form = (("T", TYPES[logits.dtype]), ("EXPERTS", count), ("CHOSEN", chosen), ("OF_ALL", int(of_all)))
    pair = [(chosen,)] * 2
    choose = Launch(kernel_text.choose_kernel(form, threads), (1, 1), pair, [mx.uint32, mx.float32])
    width = x.shape[-1]
    constants = (("T", TYPES[x.dtype]), ("WIDTH", width), ("CHOSEN", chosen))
    kernel = kernel_text.add_experts_kernel(constants, ADD_THREADS)
    return Ends(choose, Launch(kernel, (-(-width // ADD_THREADS), 1), [x.shape], [x.dtype]), of_all)


def choose(logits: mx.array, launches: Ends) -> tuple[mx.array, mx.array]:
    """The chosen experts, (chosen,) uint32, and their weights, float32; lazy. logits: of one row."""
    indices, weights = launching.run(launches.choose, [in_rows(logits)])
    return indices, weights


def add(h: mx.array, y: mx.array, weights: mx.array, launches: Ends) -> mx.array:
    """h + the weighted sum of y, (chosen, width); lazy."""
    (out,) = launching.run(launches.add, [in_rows(h), in_rows(y), weights])
    return out
