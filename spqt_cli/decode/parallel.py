"""Several processes that run one model together: how they meet, what is checked, what they tell one another.

mlx.launch, or who else starts them, tells each process by its environment who it is, and MLX's
`mx.distributed` connects them. A model is cut by mlx-lm: tensor parallel, a part of each layer on every
process, or, with `pipeline`, some of the layers on each. The processes run the same commands in the same
order; one that raises an error tells the others where they meet next, and otherwise ends at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from spqt_cli.decode import foreign, shard_blocks
from spqt_cli.errors import BackendError, ElsewhereError, UnsupportedError, UsageError
from spqt_cli.format import config_json
from spqt_cli.system import launched, peers

# NCCL's settings where nobody set others: no multicast, which not every host allows; buffers captured in a
# CUDA graph are not registered, since MLX captures other ones for every token; and graphs are not ordered
# among one another, which the stream does already.
NCCL = {"NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0", "NCCL_GRAPH_MIXING_SUPPORT": "0"}
LAUNCH = "mlx.launch -n 2 -- spqt ..."
_meets_later: ContextVar[bool] = ContextVar("meets_later", default=False)
_cut: ContextVar[tuple[bool, int] | None] = ContextVar("cut", default=None)  # (pipeline, processes)


@dataclass(frozen=True, eq=False)
class Processes:
    """Those that run a model together. rank: this one's number, from 0, of `size`.

    pipeline: each has some of the layers, not a part of each. group: MLX's.
    """

    group: Any
    rank: int
    size: int
    pipeline: bool

    @property
    def how(self) -> str:
        """Tensor or pipeline parallel, as text."""
        return "pipeline" if self.pipeline else "tensor"

    def all(self, numbers: list[float], reduce: Callable[..., mx.array] | None = None) -> list[float]:
        """Numbers added up over the processes, or reduced otherwise; every process must call it."""
        _finish_decoding()
        found = (reduce or mx.distributed.all_sum)(mx.array(numbers, mx.float32), group=self.group)
        return [float(one) for one in np.array(found)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block in which each process may fail by itself: then all leave it by an error.

        Raises what this process raised, whose `told_by_first` says whether the first one failed as well;
        ElsewhereError where others alone did.
        """
        error: Exception | None = None
        token = _meets_later.set(True)
        try:
            yield
        except Exception as raised:
            error = raised
        finally:
            _meets_later.reset(token)
        failed = self.all([float(error is not None and rank == self.rank) for rank in range(self.size)])
        if error is not None:
            error.told_by_first = failed[0] > 0 and self.rank > 0  # type: ignore[attr-defined]
            raise error
        if any(failed):
            count = sum(one > 0 for one in failed)
            raise ElsewhereError(f"{count} of {self.size} processes failed", "see what they printed")

    def agreed(self, token: mx.array) -> mx.array:
        """The first process's token, (n,) whole numbers, on all: rounding may differ between machines."""
        own = token if self.rank == 0 else mx.zeros_like(token)
        return mx.distributed.all_sum(own, group=self.group)


def join(*, pipeline: bool = False) -> Processes | None:
    """The processes that this one was started with; None where it is alone.

    Raises UsageError for `pipeline` alone, BackendError where they don't find one another, UnsupportedError
    for a pipeline over a backend that can't send.
    """
    if launched.size() == 1:
        if pipeline:
            raise UsageError("--pipeline needs several processes", f"start them: {LAUNCH}")
        return None
    if launched.by_nccl():
        for name, value in NCCL.items():
            os.environ.setdefault(name, value)
    try:
        group = mx.distributed.init(strict=True)
    except Exception as error:  # sockets, files and libraries of several backends
        raise BackendError(
            f"the processes did not find one another: {' '.join(str(error).split())[:200]}",
            "check hosts and ports of mlx.launch, and that every process was started",
        ) from None
    if group.size() == 1:
        if pipeline:
            raise UsageError("--pipeline needs several processes", f"start them: {LAUNCH}")
        return None
    if pipeline and launched.by_nccl():
        raise UnsupportedError(
            "--pipeline: MLX's NCCL backend can't send from one GPU to the next", "leave --pipeline out"
        )
    peers.watch()
    return Processes(group, group.rank(), group.size(), pipeline)


def _finish_decoding() -> None:
    """Wait for mlx-lm's loop: it runs a step ahead, on a stream of its own, and messages of two streams at
    one time would be mixed up.
    """
    if "mlx_lm.generate" in sys.modules:
        from mlx_lm.generate import generation_stream

        mx.synchronize(generation_stream)


@contextlib.contextmanager
def sharding(pipeline_group: Any, tensor_group: Any) -> Iterator[None]:
    """In this block models are loaded to be cut, as mlx-lm's `sharded_load` is told by these two.

    Nothing is added up in it: where `sharded_load` waits for the others, an error of theirs would be lost.
    They are to `meet` afterwards.
    """
    pipeline = pipeline_group is not None
    group = pipeline_group or tensor_group or mx.distributed.init()
    token = _cut.set((pipeline, group.size()))
    try:
        with foreign.replaced([(mx.distributed, "all_sum", lambda x, **_: x)]):
            yield
    finally:
        _cut.reset(token)


def meet(group: Any) -> None:
    """Wait for all processes, unless they meet at the end of `together`."""
    if not _meets_later.get():
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))


def prepare(model: Any, config: dict[str, Any]) -> None:
    """Within `sharding`: see that a model can be cut so; give it `shard` where mlx-lm's class has none.

    Raises UnsupportedError; mlx-lm itself would round heads down.
    """
    if (cut := _cut.get()) is None:
        return
    pipeline, size = cut
    name = config.get("model_type")
    if pipeline:
        if not hasattr(getattr(model, "model", None), "pipeline"):
            raise UnsupportedError(f"mlx-lm has no pipeline for architecture {name}", "leave --pipeline out")
        if (layers := len(model.model.layers)) < size:
            raise UnsupportedError(f"{layers} layers for {size} processes", "use fewer processes")
        return
    shard_blocks.give(model, config)
    if not hasattr(model, "shard"):
        hint = "--pipeline" if hasattr(getattr(model, "model", None), "pipeline") else "run it in one process"
        raise UnsupportedError(f"mlx-lm can't run architecture {name} tensor parallel", hint)
    check_heads(config, size)


def check_heads(config: dict[str, Any], size: int) -> None:
    """Raise UnsupportedError where `size` processes can't share a model's heads."""
    latent = config_json.size(config, "kv_lora_rank") is not None  # keys of all heads from one vector
    for name in ("num_attention_heads",) if latent else ("num_attention_heads", "num_key_value_heads"):
        heads = config_json.size(config, name)
        if heads is not None and heads % size:
            kind = "heads of keys" if "key" in name else "attention heads"
            fits = [str(one) for one in range(2, heads + 1) if heads % one == 0]
            raise UnsupportedError(
                f"{heads} {kind} can't be divided among {size} processes",
                f"use {' or '.join(fits[:4]) or '1'} processes, or --pipeline where mlx-lm has it",
            )
