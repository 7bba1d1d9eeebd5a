"""Transformer blocks, h = x + attention(norm(x)), y = h + mlp(norm(h)), as two calls in decode steps.

One call before attention, norm and q/k/v, and one after it: o, the residual sum, norm, the gated module and
the second sum. On a GPU at 8B shapes Python and MLX's graph cost more than the weights; this asks for less of
both. Attention itself is the model's own code. Blocks of any other form run as they are.
"""

import ast
import copy
import inspect
import textwrap
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, fused_block_gpu, phase, prepared
from spqt_cli.decode.fused_block_gpu import Counts
from spqt_cli.decode.layers import SharedInput, ZigzagLinear
from spqt_cli.decode.prepared import Parts

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
OUT = "o_proj"
_UNCOUNTED: Counts = (None, None, None, None)
_TRIAL = mx.array([-2.0, -0.7, 0.0, 0.3, 1.1, 5.0])


def install(module: nn.Module) -> None:
    """Let a block run as two calls and its attention, if that is what its class computes."""
    if "_block" not in module.__dict__ and _runs_whole(module):
        object.__setattr__(module, "_block", Block(module))
        module.__class__ = _traced(type(module))


def whole(model: nn.Module) -> tuple[str, ...]:
    """How the paths of a model's layers begin that lie in blocks which run whole, or will when loaded."""
    return tuple(f"{path}." for path, module in model.named_modules() if _runs_whole(module))


def _runs_whole(module: nn.Module) -> bool:
    if "_block" in module.__dict__:
        return True
    if any(name not in module for name in PARTS):
        return False
    attention: nn.Module = module["self_attn"]
    return _is_block(type(module)) and _ends_with_out(type(attention))


@cache
def _traced(kind: type) -> type:
    """A subclass whose one-row calls go to the module's `Block`."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None, **kwargs: Any) -> mx.array:
        block = self.__dict__.get("_block")
        y = block(x, mask, cache) if block and not kwargs and x.size == x.shape[-1] else None
        return kind.__call__(self, x, mask, cache, **kwargs) if y is None else y

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@cache
def _is_block(kind: type) -> bool:
    """Whether the class's own code is the formula above, tried with numbers for its parts."""
    mask, cache, calls = object(), object(), []

    def attention(*args: Any, **kwargs: Any) -> mx.array:
        calls.append((args[1:], kwargs))
        return mx.sin(args[0])

    parts = (lambda x: x * 2.0, attention, lambda h: h * 3.0 + 1.0, mx.tanh)
    try:
        found = kind.__call__(SimpleNamespace(**dict(zip(PARTS, parts, strict=True))), _TRIAL, mask, cache)
        h = _TRIAL + mx.sin(_TRIAL * 2.0)
        right = bool(mx.allclose(found, h + mx.tanh(h * 3.0 + 1.0), rtol=1e-5, atol=1e-5).item())
    except Exception:  # the class wants more of its module than four parts: others' code, any error
        return False
    return right and calls == [((mask, cache), {})]


@cache
def _ends_with_out(kind: type) -> bool:
    """Whether all that the attention class returns is `self.o_proj(...)`, as its source says."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__call__)))
    except (OSError, TypeError, SyntaxError):  # no source at hand, or none to be understood
        return False
    results = [
        ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value
    ]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == OUT]
    return len(results) == len(uses) > 0 and all(result.startswith(f"self.{OUT}(") for result in results)


class Block:
    """One block's calls, prepared for its layers as they are; None where they can't be.

    None for a prompt of one row, too, where layers skip channels: prompts run dense.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._form: tuple[Any, ...] = ()
        self._parts = Parts([])
        self._head: interface.HeadStep | None = None
        self._tail: interface.TailStep | None = None
        self._around: fused_block_gpu.Around | None = None
        self._groups: list[SharedInput] = []  # q/k/v; o; gate and up; down
        self._skips = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Block":
        """The same for the copied module; what was prepared belongs to the old one."""
        return Block(copy.deepcopy(self.module, memo))

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
        """y for x, one row; None where the module's own code is to run."""
        if (x.dtype, x.ndim) != self._form or not self._parts.unchanged():
            self._prepare(x)
        if self._head is None or self._tail is None or (self._skips and not phase.decodes()):
            return None
        step: Any = self.step
        if self._around is not None and self._around.takes(x, mask, cache):
            step = self._around.step
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._groups)
        if tally is None:
            return step(x, mask, cache, _UNCOUNTED)[0]
        y, counted = step(x, mask, cache, tally.running)
        tally.keep(counted)
        return y

    def step(self, x: mx.array, mask: Any, cache: Any, counted: Counts) -> tuple[mx.array, Counts]:
        """y, and the counts, with the module's own attention."""
        assert self._head is not None
        assert self._tail is not None
        normed, products, count = self._head(x, counted[0])
        y, counts = self._tail(self._attended(normed, products, mask, cache), x, counted[1:])
        return y, [count, *counts]

    def _attended(self, normed: mx.array, products: list[mx.array], mask: Any, cache: Any) -> mx.array:
        """What the module's own attention gives to its last product."""
        shared, out = self._groups[:2]
        shared.offer(normed, products)
        out.postponed = True
        try:
            return self.module["self_attn"](normed, mask, cache)
        finally:
            out.postponed = False

    def _prepare(self, x: mx.array) -> None:
        before, attention, after, mlp = (self.module[name] for name in PARTS)
        names = getattr(mlp.__dict__.get("_gated"), "names", ())
        layers = [attention.get("q_proj"), attention.get(OUT), *(mlp.get(name) for name in names)]
        shared = layers[0]._siblings.layers if isinstance(layers[0], ZigzagLinear) else []
        self._form, self._head, self._tail, self._around = (x.dtype, x.ndim), None, None, None
        prepared.arrange(layers)
        self._parts = Parts(
            [
                *((self.module, name) for name in PARTS),
                *((norm, "weight") for norm in (before, after)),
                *prepared.within(attention),
                *((mlp, name) for name in names),
                *prepared.of_layers([*shared, *layers[1:]]),
            ]
        )
        norms = all(type(norm) is nn.RMSNorm for norm in (before, after))
        if not (norms and names and all(isinstance(layer, ZigzagLinear) for layer in layers)):
            return
        q, out, gate, up, down = layers
        self._groups = [layer._siblings for layer in (q, out, gate, down)]
        together = [list(map(id, group.layers)) for group in self._groups[1:]]
        if together != [[id(out)], [id(gate), id(up)], [id(down)]]:
            return
        self._skips = any(layer.threshold is not None for layer in [*shared, out, gate, up, down])
        tail = interface.Tail(out, interface.Norm(after["weight"], after.eps), [gate, up], down)
        self._tail = select.prepare_tail(x, tail)
        self._head = select.prepare_head(interface.Norm(before["weight"], before.eps), shared)
        if self._head and self._tail and select.backend().traces and fused_block_gpu.traceable(attention):
            own = fused_block_gpu.Own(attention, interface.Norm(before["weight"], before.eps), self._attended)
            self._around = fused_block_gpu.Around(x, own, self._head, self._tail)
