"""Calls of the GPU kernels that a plan describes; each kernel is built once. Decides nothing."""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from spqt_cli.backends.gpu import kernel_text
from spqt_cli.backends.gpu.kernel_text import Kernel
from spqt_cli.backends.gpu.launch_plan import Launch, Plan
from spqt_cli.backends.interface import Count


def launch(
    x: mx.array, plan: Plan, counted: Count = None, other: mx.array | None = None
) -> tuple[list[mx.array], Count]:
    """The outputs of a plan's one or two kernel calls, and `counted` plus the active channels; lazy.

    Counting partial sums takes a call of its own, left out where nobody counts.
    other: what the reduction takes besides sums: the residual stream, or the turns of a position.
    """
    assert plan.gemv is not None
    *outputs, last = run(plan.gemv, plan.first_inputs(x, counted))
    if plan.reduce is None or plan.counts is None:
        return outputs, last
    sums = [last, plan.inputs[0]]
    outputs = run(plan.reduce, sums if other is None else [*sums, other])
    if counted is None:
        return outputs, None
    (active,) = run(plan.counts, [*sums, counted])
    return mx.depends(outputs, [active]), active  # else a count that nobody reads yet would keep the sums


def run(launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """The outputs of one kernel call; lazy."""
    if launch.built is None:
        launch.built = _built(launch.kernel)
    x, y = launch.threadgroups
    threads = launch.kernel.threads
    return launch.built(
        inputs=inputs,
        grid=(x * threads, y, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )


@cache
def _built(kernel: Kernel) -> Callable[..., list[mx.array]]:
    if mx.metal.is_available():
        make: Any = mx.fast.metal_kernel
        source, head = kernel.source, kernel_text.header()
    else:
        make = mx.fast.cuda_kernel
        source, head = kernel_text.cuda(kernel)
    return make(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source,
        header=head,
    )
