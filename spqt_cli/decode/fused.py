"""Modules whose decode steps run fused: transformer blocks, and gated feed-forward modules in other blocks.

    block: h = x + attention(norm(x)), y = h + mlp(norm(h));  mlp: down(silu(gate(x)) * up(x))

A block takes one call before attention, norm and q/k/v, and one after it: o, the residual sum, norm, the
gated module and the second sum; of a mixture of experts up to the norm, then its own code, on a GPU a step
(mixture_gpu.py). On a GPU at 8B shapes Python and MLX's graph cost more than the weights; this asks for
less of both. Attention itself is one operation on the CPU (attention_cpu.py), and on a GPU traced around its
product, or else the model's own code (attention_gpu.py). Other modules run as they are.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, attention_cpu, chain, foreign, phase, recognize
from spqt_cli.decode.attention_gpu import OwnAttention, TracedStep
from spqt_cli.decode.layers import SharedInput
from spqt_cli.decode.mixture_gpu import TracedMixture, places

Counts = Sequence[interface.Count]
Place = tuple[dict[str, Any], str]  # where something is kept: a module, or its attributes, and a key
BLOCK, MLP = "_fused_block", "_fused_mlp"  # under which a module keeps its step


def install(model: nn.Module) -> None:
    """Let the modules of a model with Zigzag layers run fused, where the backend has steps for them."""
    backend = select.backend()
    if backend.fused:
        for module in model.modules():
            install_mlp(module)
        for module in model.modules():
            install_block(module)
    if backend.native_float32:
        for module in model.modules():
            install_attention(module)


def forget(model: nn.Module) -> None:
    """Let the next token prepare each module's step, and hold it against its own code, as the first does."""
    for module in model.modules():
        for name in (BLOCK, MLP):
            if (step := module.__dict__.get(name)) is not None:
                step.forget()


def install_mlp(module: nn.Module) -> None:
    """Let a module with Zigzag gate, up and down run as one call, if that is what its class computes."""
    names = recognize.gated(module) if MLP not in module.__dict__ else None
    if names is not None and all(recognize.is_zigzag(module[name]) for name in names):
        _answer_calls(module, MLP, FusedMLP(module, names))


def install_block(module: nn.Module) -> None:
    """Let a block run fused, if that is what its class computes."""
    if BLOCK not in module.__dict__ and not recognize.form(module):
        _answer_calls(module, BLOCK, FusedBlock(module))


def install_attention(module: nn.Module) -> None:
    """Let an attention module take one token as one CPU operation, if that is what its class computes."""
    if attention_cpu.ATTRIBUTE not in module.__dict__ and recognize.cached_attention(module) is not None:
        _answer_calls(module, attention_cpu.ATTRIBUTE, attention_cpu.CachedAttention(module))


def _answer_calls(module: nn.Module, attribute: str, step: Callable[..., mx.array | None]) -> None:
    """Let `step` answer the calls of `module` with one row, and those with a row of each of several sequences
    where the backend's steps take them; where it gives None, the module's own code does.

    attribute: under which the module keeps the step.
    """
    object.__setattr__(module, attribute, step)
    call = _asking(attribute, select.backend().fused_rows)
    foreign.change_class(module, call, computes_the_same=True)


@cache
def _asking(attribute: str, most: int) -> Callable[[Any], Callable[..., Any]]:
    def make_call(kind: Any) -> Callable[..., Any]:
        def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            step = self.__dict__.get(attribute)
            one = x.size == x.shape[-1] or (interface.is_token_each(x) and 0 < x.shape[0] <= most)
            if step is not None and one:
                y = step(x, *args, **kwargs)
                if y is not None:
                    return y
            return kind.__call__(self, x, *args, **kwargs)

        return call

    return make_call


class Sources:
    """What lay at some places when this was made.

    A profile, a calibration or a user may put other layers, weights or thresholds in at any time. A decode
    step asks hundreds of times a token, so the question is a few dictionary lookups.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        places = list(places)
        self.holders = [holder for holder, _ in places]
        self.keys = [key for _, key in places]
        self.known = list(map(dict.get, self.holders, self.keys))

    def unchanged(self) -> bool:
        """Whether the very same things lie there now."""
        return all(map(is_, map(dict.get, self.holders, self.keys), self.known))


def _arrange(layers: Iterable[Any]) -> None:
    """Let the backend lay the Zigzag layers' weights out, before their arrays are remembered."""
    for layer in layers:
        if recognize.is_zigzag(layer):
            select.arrange(layer.shared_input.layers)


def _of_layers(layers: Iterable[Any]) -> list[Place]:
    """The places of the weights and thresholds of those that are Zigzag layers."""
    zigzag = [layer for layer in layers if recognize.is_zigzag(layer)]
    return [(layer, "weight") for layer in zigzag] + [(layer.__dict__, "_threshold") for layer in zigzag]


def _within(module: Any) -> list[Place]:
    """The places of a module's arrays and parts, and of theirs where they are no Zigzag layers."""
    children = [value for value in module.values() if isinstance(value, nn.Module)]
    plain = [child for child in children if not recognize.is_zigzag(child)]
    return [(holder, key) for holder in (module, *plain) for key in holder]


class FusedMLP:
    """One module's step, prepared for its layers as they are.

    It gives None, and the module's own code runs, where they can't be fused, and for a prompt of one row
    where layers skip channels: prompts run dense.
    """

    def __init__(self, module: Any, names: tuple[str, str, str]) -> None:
        self.module, self.names = module, names
        self._form: tuple[Any, ...] = ()
        self._sources = Sources([])
        self._step: interface.GatedStep | None = None
        self._groups: list[SharedInput] = []  # gate and up; down
        self._skips = False
        self._part: Any = None  # of down, where it was cut over processes

    def forget(self) -> None:
        """Prepare anew with the next token."""
        self._form = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedMLP":
        """The same for the copied module; what was prepared belongs to the old one."""
        return FusedMLP(copy.deepcopy(self.module, memo), self.names)

    def __call__(self, x: mx.array, *others: Any, **named: Any) -> mx.array | None:
        """y for x, one row of each sequence; None where the module's own code is to run."""
        if others or named:
            return None
        if (x.dtype, x.ndim) != self._form or not self._sources.unchanged():
            self._prepare(x)
        if self._step is None or (self._skips and not phase.decodes()):
            return None
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._groups, x.size // x.shape[-1])
        if tally is None:
            y = self._step(x, None, None)[0]
        else:
            y, *counted = self._step(x, *tally.running)
            tally.keep(counted)
        return y if self._part is None else self._part.finish(y)

    def _prepare(self, x: mx.array) -> None:
        layers = [self.module.get(name) for name in self.names]
        self._form, self._step = (x.dtype, x.ndim), None
        _arrange(layers)
        places = [(self.module, name) for name in self.names]
        self._sources = Sources([*places, *_of_layers(layers)])
        if not all(map(recognize.is_zigzag, layers)):
            return  # a profile's row-grouped layer, or a watched one
        gate, up, down = layers
        self._part = down.part
        if gate.part is not None or up.part is not None:
            return  # they compute more outputs than they have
        if [id(layer) for layer in gate.shared_input.layers] == [id(gate), id(up)]:
            self._groups = [gate.shared_input, down.shared_input]
            self._skips = any(layer.threshold is not None for layer in layers)
            self._step = select.prepare_gated(x, [gate, up], down)


class FusedBlock:
    """One block's decode step, prepared for its layers as they are.

    It gives None, and the module's own code runs, where they can't be fused (`reason` says why), and for a
    prompt of one row where layers skip channels: prompts run dense.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.reason: str | None = None  # "" where it runs fused; None before the first token
        self._form: tuple[Any, ...] = ()
        self._sources = Sources([])
        self._front: interface.HeadStep | None = None
        self._tail: interface.TailStep | interface.MiddleStep | None = None
        self._rest: str | None = None  # under which the module has what the tail leaves out
        self._mixture: TracedMixture | None = None  # the same, where the backend traces
        self._own: OwnAttention | None = None
        self._cached: attention_cpu.CachedAttention | None = None
        self._traced: TracedStep | None = None
        self._groups: list[SharedInput] = []  # as `Block.launches`
        self._skips = False
        self._parted = False  # over processes, which add up between its products
        self.chain: Callable[[], chain.Chain | None] | None = None
        self.place, self.alone = 0, False  # in the chain; in none

    def forget(self) -> None:
        """Prepare anew with the next token."""
        self._form, self.chain, self.alone = (), None, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedBlock":
        """The same for the copied module; what was prepared belongs to the old one."""
        return FusedBlock(copy.deepcopy(self.module, memo))

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, **others: Any) -> mx.array | None:
        """y for x, one row of each sequence; None where the module's own code is to run."""
        if others:
            return None
        if self.chain is not None and (whole := self.chain()) is not None:
            known = whole.result(self.place, x, mask, cache)
            if known is not None:
                return known
        if (x.dtype, x.ndim) != self._form or not self._sources.unchanged():
            self._prepare(x)
        if self.reason or (self._skips and not phase.decodes()):
            return None
        step: Any = self._step
        if self._traced is not None and self._traced.takes(x, mask, cache):
            step = self._traced.step
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._groups, x.size // x.shape[-1])
        if tally is None:
            y, _ = step(x, mask, cache, [None] * len(self._groups))
        else:
            y, counted = step(x, mask, cache, tally.running)
            tally.keep(counted)
        if self._rest is None:
            if self._cached is not None and type(cache) in self._cached.kinds:
                chain.ran(self, x, y, cache)
            return y
        h, normed = y
        mixture = self._mixture
        if mixture is None or (result := mixture(h, normed)) is None:
            result = h + self.module[self._rest](normed)
        return result

    def steps(self) -> chain.Steps | None:
        """As `chain.Member`'s."""
        if self.reason or self._cached is None or self._rest is not None or self._parted:
            return None
        if self._cached.module.get("rope") is not self._cached.rope:
            return None
        layers = [layer for group in self._groups for layer in group.layers]
        sources = self._sources
        return chain.Steps(
            self._front,
            self._cached.step,
            self._tail,
            layers,
            self._skips,
            sources.holders,
            sources.keys,
            sources.known,
        )

    @property
    def attention(self) -> str:
        """Why attention between the two calls is its own code; "" where it is not, or nothing is fused."""
        if self.reason != "" or self._cached is not None:
            return ""
        if self._traced is not None:
            return self._traced.reason or ""
        return "it is not rotary positions and the product alone" if select.backend().native_float32 else ""

    @property
    def mixture(self) -> str:
        """Why a mixture after the tail runs by its own code where a backend traces; "" where it does not."""
        return "" if self._mixture is None else self._mixture.reason or ""

    def _step(self, x: mx.array, mask: Any, cache: Any, counted: Counts) -> tuple[Any, Counts]:
        """What the tail gives, and the counts, by two calls and attention between them."""
        assert self._front is not None
        assert self._tail is not None
        assert self._own is not None
        normed, products, count = self._front(x, counted[0])
        if self._cached is not None and self._cached.takes(normed, mask, cache):
            attended = self._cached.attended(products, mask, cache)
        else:
            attended = self._own(normed, products, mask, cache)
        y, counts = self._tail(attended, x, counted[1:])
        return y, [count, *counts]

    def _prepare(self, x: mx.array) -> None:
        module = self.module
        parts = recognize.parts(module)
        first, attention, second, mlp = (module[name] for name in parts)
        names = recognize.gated(mlp) or ()
        zigzag = [attention.get(name) for name in (*recognize.PROJECTIONS, recognize.OUT)]
        zigzag += [mlp.get(name) for name in names]
        backend = select.backend()
        mixtures = [mlp] if backend.traces and not names else []
        _arrange([*zigzag, *(one for mixed in mixtures for one in mixed.modules())])
        self._form = (x.dtype, x.ndim)
        self._sources = Sources(
            [
                *((module, name) for name in parts),
                *((norm, "weight") for norm in (first, second)),
                *_within(attention),
                *((mlp, name) for name in names),
                *_of_layers(zigzag),
                *(place for mixed in mixtures for place in places(mixed)),
            ]
        )
        self._traced = self._cached = self._own = self._rest = self._mixture = None
        found = recognize.block(module, backend)
        if isinstance(found, str):
            self.reason = found
            return
        self._front = select.prepare_head(found.norm, found.projections)
        if isinstance(found.tail, interface.Tail):
            self._tail = select.prepare_tail(x, found.tail)
        else:
            self._tail, self._rest = select.prepare_middle(x, found.tail), parts[3]
        if self._front is None or self._tail is None:
            self.reason = f"backend {backend.name} has no fused step for {x.dtype} and these sizes"
            return
        self.reason = ""
        self._groups = [layers[0].shared_input for layers in found.launches]
        self._parted = isinstance(found.tail, interface.Tail) and found.tail.total is not None
        self._skips = any(group.skips for group in self._groups)
        self._own = OwnAttention(attention, found.projections)
        if backend.traces:
            self._traced = TracedStep(x, found, self._own, self._front, self._tail)
            self._mixture = None if self._rest is None else TracedMixture(mlp)
        elif found.rope is not None:
            self._cached = attention.__dict__.get(attention_cpu.ATTRIBUTE)


@dataclass
class Report:
    """How many of a model's transformer blocks run fused; why others do not: reason -> number of blocks.

    attention: of the fused ones, those with their own code between the two calls, by the reason.
    experts: those with a mixture's own code after them, on a backend that never traces it. mixtures: on one
    that does, those whose mixture it does not take, by the reason.
    """

    blocks: int = 0
    fused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)
    mixtures: dict[str, int] = field(default_factory=dict)
    experts: int = 0

    def line(self) -> str:
        """One line of text."""
        text = f"{self.fused} of {self.blocks} blocks run fused"
        kinds = [
            ("do not", self.reasons),
            ("by attention's own code", self.attention),
            ("by their mixture's own code", self.mixtures),
        ]
        for verb, counted in kinds:
            text += "".join(f"; {count} {verb}: {reason}" for reason, count in _by_count(counted))
        return f"{text}; {self.experts} up to their experts" if self.experts else text


def _by_count(counted: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counted.items(), key=lambda item: -item[1])


def report(model: nn.Module, zigzag: Callable[[Any], bool] = recognize.is_zigzag) -> Report:
    """What holds for a model on this backend: as it last ran, or as it would for blocks that have not run.

    zigzag: which layers are or will be Zigzag layers.
    """
    found, backend = Report(), select.backend()
    for module in recognize.blocks(model, zigzag).values():
        block: FusedBlock | None = module.__dict__.get(BLOCK)
        reason = block.reason if block is not None else None
        if reason is None:
            reason = recognize.why_not(module, backend, zigzag)
        own = block.attention if block is not None else ""
        found.blocks += 1
        found.fused += not reason
        mixed = not reason and recognize.has_experts(module[recognize.parts(module)[3]])
        found.experts += mixed and not backend.traces
        mixture = block.mixture if block is not None else ""
        for said, counts in ((reason, found.reasons), (own, found.attention), (mixture, found.mixtures)):
            if said:
                counts[said] = counts.get(said, 0) + 1
    return found
