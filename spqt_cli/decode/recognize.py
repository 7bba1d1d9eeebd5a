"""Which transformer blocks have the form that fused decode steps compute, and why others do not.

    h = x + out(attention(norm(x))),  y = h + down(silu(gate(n)) * up(n)) with n = norm(h)

or, of a mixture of experts, y = h + mlp(n), whose code is the module's own.
Names prove nothing: a class is run once with small functions in the place of its parts, and its result is
held against the formula. The CPU, the GPU, profiles and `spqt inspect` ask here. It prepares no steps.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import interface
from spqt_cli.decode import foreign
from spqt_cli.decode.bytes_read import BLOCK, is_experts
from spqt_cli.decode.exact import ExactRoPE
from spqt_cli.decode.layers import is_adapter
from spqt_cli.format import contract

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm")
FEED_FORWARD = ("mlp", "block_sparse_moe")  # the last part, by names in mlx-lm's models
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OUT = "o_proj"
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # gate, up and down in mlx-lm's models

IsZigzag = Callable[[Any], bool]


class Rope(NamedTuple):
    """The settings with which a module calls `mx.fast.rope`, but the offset. freqs: (dims / 2,) or None."""

    dims: int
    traditional: bool
    base: float | None
    scale: float
    freqs: mx.array | None


class Block(NamedTuple):
    """A block that fused steps can compute, as it is now.

    projections: of the first norm's result, in one launch: q, and k and v where they are Zigzag layers.
    rope: None where attention does more than rotate q and k and ask for the product with its cache.
    tail: attention's last layer and all that follows it; of a mixture, up to its experts.
    """

    norm: interface.Norm
    projections: list[Any]
    rope: Rope | None
    tail: interface.Tail | interface.Middle

    @property
    def launches(self) -> list[list[Any]]:
        """The Zigzag layers that run together: q/k/v; o; then gate and up, and down, where they are fused."""
        found = [self.projections, [self.tail.out]]
        if isinstance(self.tail, interface.Tail):
            found += [list(self.tail.pair), [self.tail.down]]
        return found


def is_zigzag(layer: Any) -> bool:
    """Whether a layer is a ZigzagLinear, by its mode."""
    return getattr(layer, "mode", None) == contract.MODE


def block(module: Any, backend: interface.Backend) -> Block | str:
    """What a fused step of a transformer block is made of, or in a few words why there can be none."""
    if reason := why_not(module, backend):
        return reason
    before, attention, after, mlp = (module[name] for name in parts(module))
    q, out = attention[PROJECTIONS[0]], attention[OUT]
    middle = interface.Middle(out, interface.Norm(after["weight"], after.eps))
    tail: interface.Tail | interface.Middle = middle
    if names := gated(mlp):
        gate, up, down = (mlp[name] for name in names)
        groups = [list(map(id, layer.shared_input.layers)) for layer in (out, gate, up, down)]
        if groups != [[id(out)], [id(gate), id(up)], [id(gate), id(up)], [id(down)]]:
            return "gate and up do not run in one launch"
        total = None if out.part is None else interface.Total(out.part.total, out.part.is_first)
        tail = interface.Tail(*middle, [gate, up], down, total)
    projections = list(q.shared_input.layers)
    own = [id(attention.get(name)) for name in PROJECTIONS] == list(map(id, projections))
    norm = interface.Norm(before["weight"], before.eps)
    return Block(norm, projections, cached_attention(attention) if own else None, tail)


def why_not(module: Any, backend: interface.Backend, zigzag: IsZigzag = is_zigzag) -> str:
    """Why a block can't run fused; "" where it can. zigzag: which layers are or will be Zigzag layers."""
    if not backend.fused:
        return f"backend {backend.name} has no fused steps"
    if reason := form(module):
        return reason
    _, attention, _, mlp = (module[name] for name in parts(module))
    names = (PROJECTIONS[0], OUT, *(gated(mlp) or ()))
    within = (*PROJECTIONS, *names[1:])
    if adapted := [name for name in within if is_adapter(attention.get(name) or mlp.get(name))]:
        *others, last = adapted
        return f"adapters on {', '.join(others)} and {last}" if others else f"adapters on {last}"
    others = [name for name in names if not zigzag(attention.get(name) or mlp.get(name))]
    if others:
        return f"{' and '.join(others)} not in the Zigzag layout"
    own = {name: getattr(attention.get(name) or mlp.get(name), "part", None) for name in within}
    if not gated(mlp) and any(part is not None for part in own.values()):
        return "a mixture's layers are cut over processes"
    return _why_not_parts(own, (OUT, names[-1]))


def _why_not_parts(parts: Mapping[str, Any], summed: Sequence[str]) -> str:
    """Why a block whose layers were cut over processes can't run fused; "" where it can."""
    if cut := [name for name, part in parts.items() if part is not None and part.kept]:
        return f"{' and '.join(cut)} cut within a group of weights"
    adds = {name for name, part in parts.items() if part is not None and part.group is not None}
    others = {name for name, part in parts.items() if part is not None} - adds
    if others or adds not in (set(), set(summed)):
        return "its layers are cut over processes in another way"
    return ""


def form(module: Any) -> str:
    """Why a block's classes compute another formula than the one above; "" where they compute it."""
    names = parts(module)
    if missing := [name for name in names if name not in module]:
        return f"it has no {missing[0]}"
    kind, attention, mlp = foreign.own_class(module), module[names[1]], module[names[3]]
    if not _is_block(kind, names[3]):
        return f"{kind.__name__} adds up norms, attention and mlp in another way"
    if any(type(module[name]) is not nn.RMSNorm for name in (names[0], names[2])):
        return "its norms are not nn.RMSNorm"
    if PROJECTIONS[0] not in attention:
        return f"attention has no {PROJECTIONS[0]}"
    if "_window" in attention.__dict__:
        return "attention makes the mask of its own window"
    if reason := _more_than_out(foreign.own_class(attention)):
        return reason
    if gated(mlp) is None and not has_experts(mlp):
        return "mlp is not down(silu(gate) * up)"
    return ""


def parts(module: Any) -> tuple[str, str, str, str]:
    """The names of a block's parts: norm, attention, norm, feed-forward module; it may lack some."""
    return *PARTS, next((name for name in FEED_FORWARD if name in module), FEED_FORWARD[0])


def has_experts(mlp: nn.Module) -> bool:
    """Whether a feed-forward module is a mixture of experts."""
    return any(map(is_experts, mlp.modules()))


def mixture(module: Any) -> interface.Mixture | None:
    """A module as a router, and experts whose results are weighed by a softmax of its largest numbers; None
    where it is anything else.
    """
    from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

    if set(module) != {"gate", "switch_mlp"} or module.__dict__.get("sharding_group") is not None:
        return None
    experts = module["switch_mlp"]
    if foreign.own_class(experts) is not SwitchGLU or type(experts["activation"]) is not SwiGLU:
        return None
    pair, down = [experts[name] for name in GATED[0][:2]], experts[GATED[0][2]]
    if not all(is_zigzag(layer) and layer.part is None for layer in (*pair, down)):
        return None
    if any(map(is_zigzag, module["gate"].modules())):
        return None
    if [list(map(id, one.shared_input.layers)) for one in (pair[0], down)] != [
        list(map(id, pair)),
        [id(down)],
    ]:
        return None
    found = _weighing(module, down.weight.shape[0])
    return None if found is None else interface.Mixture(module["gate"], pair, down, *found)


def _weighing(module: Any, experts: int) -> tuple[int, bool] | None:
    """How many experts a mixture's own code chooses, and whether the softmax that weighs them is of all the
    router's numbers; None where it gives anything else. It is run with functions in the place of its parts,
    on numbers of several sizes, the largest apart or side by side.
    """
    rows, width = 96, 8
    keys = mx.random.split(mx.random.key(7), 3)
    table = mx.random.normal((experts, width), key=keys[0])
    x = mx.random.normal((1, rows, width), key=keys[1])
    sizes = mx.array([1.0, 8.0, 40.0] * (rows // 3))[:, None]
    numbers = sizes * mx.random.normal((rows, experts), key=keys[2])
    numbers = mx.concatenate([numbers[: rows // 2], mx.sort(numbers[rows // 2 :], axis=-1)])
    asked, same = [], []

    def router(given: mx.array) -> mx.array:
        same.append(mx.array_equal(given.reshape(x.shape), x))
        return numbers.reshape(*given.shape[:-1], experts)

    def results(given: mx.array, indices: mx.array) -> mx.array:
        same.append(mx.array_equal(given.reshape(x.shape), x))
        asked.append(indices.shape[-1])
        return table[indices]

    stand_in: Any = dict.__new__(type(module))
    object.__setattr__(stand_in, "__dict__", module.__dict__)
    dict.update(stand_in, {"gate": router, "switch_mlp": results})
    try:
        found = foreign.own_class(module).__call__(stand_in, x).reshape(rows, width)
        known = len(same) == 2 and mx.stack(same).all().item()
    except Exception:  # code of others, which may ask its parts for anything
        return None
    if not known:
        return None
    chosen = asked[0]
    best = mx.argsort(-numbers, axis=-1)[:, :chosen]
    for of_all in (False, True):
        weights = mx.softmax(numbers if of_all else _kept(numbers, best), axis=-1)
        expected = (mx.take_along_axis(weights, best, axis=-1)[..., None] * table[best]).sum(axis=1)
        if mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item():
            return chosen, of_all
    return None


def _kept(numbers: mx.array, best: mx.array) -> mx.array:
    """Numbers (rows, experts) with all others than the best at minus infinity."""
    kept = mx.put_along_axis(mx.full(numbers.shape, -mx.inf), best, mx.array(0.0), axis=-1)
    return numbers + kept


def blocks(model: nn.Module, zigzag: IsZigzag = is_zigzag) -> dict[str, nn.Module]:
    """Path -> module of each transformer block of a model that has Zigzag layers."""
    modules = dict(model.named_modules())
    found = {}
    for path, module in modules.items():
        if (numbered := BLOCK.search(path)) and zigzag(module):
            own = path[: numbered.end() - 1]
            found[own] = modules[own]
    return found


def formed(model: nn.Module) -> Iterator[str]:
    """The paths of what fused steps compute of a model's blocks, whatever layout its layers have: the whole
    block, or where a mixture follows its attention module.
    """
    for path, module in model.named_modules():
        if not form(module):
            _, attention, _, mlp = parts(module)
            yield f"{path}.{attention}" if has_experts(module[mlp]) else path


def gated(module: Any) -> tuple[str, str, str] | None:
    """The names of gate, up and down in a module that computes down(silu(gate(x)) * up(x)), else None."""
    for names in GATED:
        if all(name in module for name in names) and _is_gated(foreign.own_class(module), names):
            return names
    return None


def cached_attention(module: Any) -> Rope | None:
    """The rotary settings of a module that computes out(softmax(rope(q) @ keys.T * scale) @ values), where
    rope(k) and v join the cache first; None for one that does anything else.
    """
    if any(name not in module for name in (*PROJECTIONS, OUT, "rope")):
        return None
    return rope(module["rope"]) if _is_cached_attention(foreign.own_class(module)) else None


def rope(module: Any) -> Rope | None:
    """The settings of a rotary module; None where they aren't known."""
    from mlx_lm.models.rope_utils import Llama3RoPE

    if type(module) is nn.RoPE:
        return Rope(module.dims, module.traditional, module.base, module.scale, None)
    if type(module) is Llama3RoPE or (type(module) is ExactRoPE and module.mscale == 1.0):
        return Rope(module.dims, module.traditional, None, 1.0, module._freqs)
    return None


def _computes(call: Callable[[], mx.array], expected: Callable[[], mx.array], tolerance: float) -> bool:
    """Whether foreign code, run with stand-ins for its parts, gives what is expected of it."""
    try:
        return bool(mx.allclose(call(), expected(), rtol=tolerance, atol=tolerance).item())
    except Exception:  # the class wants more of its module than the stand-ins have: any error says no
        return False


_ROW = mx.array([-6.0, -2.0, -1.5, -0.7, -0.3, 0.0, 0.2, 0.3, 0.9, 1.1, 2.5, 7.0])


@cache
def _is_gated(kind: Any, names: tuple[str, str, str]) -> bool:
    factor = mx.arange(1.0, 1.0 + _ROW.size)
    parts = (lambda x: x, lambda x: x * 0 + factor, lambda h: h + 1.0)
    module = SimpleNamespace(**dict(zip(names, parts, strict=True)))
    return _computes(lambda: kind.__call__(module, _ROW), lambda: nn.silu(_ROW) * factor + 1.0, 1e-5)


@cache
def _is_block(kind: Any, feed_forward: str = FEED_FORWARD[0]) -> bool:
    mask, cache, calls = object(), object(), []

    def attention(*args: Any, **kwargs: Any) -> mx.array:
        calls.append((args[1:], kwargs))
        return mx.sin(args[0])

    parts = (lambda x: x * 2.0, attention, lambda h: h * 3.0 + 1.0, mx.tanh)
    names, h = (*PARTS, feed_forward), _ROW + mx.sin(_ROW * 2.0)
    module = SimpleNamespace(**dict(zip(names, parts, strict=True)))
    right = _computes(
        lambda: kind.__call__(module, _ROW, mask, cache), lambda: h + mx.tanh(h * 3.0 + 1.0), 1e-5
    )
    return right and calls == [((mask, cache), {})]


@cache
def _more_than_out(kind: Any) -> str:
    """Why it isn't certain that all an attention class returns is `self.o_proj(...)`; "" where it is.

    By its source: a trial would see one way through the code, and caches and masks choose among several.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__call__)))
    except (OSError, TypeError, SyntaxError):
        return f"the source of {kind.__name__} is not at hand"
    nodes = list(ast.walk(tree))
    results = [ast.unparse(node.value) for node in nodes if isinstance(node, ast.Return) and node.value]
    uses = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == OUT]
    right = len(results) == len(uses) > 0 and all(one.startswith(f"self.{OUT}(") for one in results)
    return "" if right else f"attention returns more than {OUT}"


_HEADS, _KEY_HEADS, _WIDTH, _SCALE = 4, 2, 8, 0.3


@cache
def _is_cached_attention(kind: Any) -> bool:
    from mlx_lm.models.cache import KVCache

    def rotate(a: mx.array, offset: int = 0) -> mx.array:
        return a * mx.arange(1.0, 1.0 + _WIDTH) / 5 + offset

    def heads(a: mx.array, count: int) -> mx.array:
        return a.reshape(1, 1, count, _WIDTH).swapaxes(1, 2)

    x, size = mx.sin(mx.arange(_HEADS * _WIDTH, dtype=mx.float32))[None, None], _KEY_HEADS * _WIDTH
    layers = (mx.cos, lambda x: x[..., :size] * 2, lambda x: mx.exp(x[..., :size]), lambda y: y * 3 + 1)
    sizes = {"n_heads": _HEADS, "n_kv_heads": _KEY_HEADS, "head_dim": _WIDTH, "scale": _SCALE}
    parts = dict(zip((*PROJECTIONS, OUT), layers, strict=True))
    module = SimpleNamespace(**parts, **sizes, rope=rotate)
    past = [mx.cos(mx.arange(2.0 * size) * (i + 1)).reshape(1, _KEY_HEADS, 2, _WIDTH) for i in range(2)]
    kept = KVCache()
    kept.update_and_fetch(*past)
    q, k, v = (layer(x) for layer in layers[:3])
    new = rotate(heads(k, _KEY_HEADS), 2), heads(v, _KEY_HEADS)
    keys, values = (mx.concatenate(list(pair), axis=2) for pair in zip(past, new, strict=True))
    repeated = [mx.repeat(a, _HEADS // _KEY_HEADS, axis=1) for a in (keys, values)]
    scores = mx.softmax(rotate(heads(q, _HEADS), 2) @ repeated[0].swapaxes(2, 3) * _SCALE, axis=-1)
    expected = layers[3]((scores @ repeated[1]).swapaxes(1, 2).reshape(1, 1, -1))
    if not _computes(lambda: kind.__call__(module, x, None, kept), lambda: expected, 1e-4):
        return False
    found = mx.concatenate(kept.keys_and_values()) if kept.offset == 3 else None
    return found is not None and _computes(lambda: found, lambda: mx.concatenate([keys, values]), 1e-4)
