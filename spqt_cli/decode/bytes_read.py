"""What a token reads of a model's weights: how much of it can be skipped, and what stays out and why.

Of a mixture of experts the chosen experts count, of an embedding one row, of one that is the head too all.
It knows mlx-lm's modules and sizes; it reads no weights and chooses no layout.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx import nn

BLOCK = re.compile(r"\.\d+\.")  # a path inside a numbered list of modules: a transformer block
TOWER = re.compile(r"(^|[._])(vision|visual|audio|image|speech)([._]|$)")
EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")  # experts kept as a list of modules
ATTENTION = re.compile(r"(^|\.)\w*attn\.")  # of its groups (deepseek_v41) each has its own part of the heads
VECTORS = "no matrices"
# How mlx-lm's modules and configs call the number of experts that a token is sent to.
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k",
)  # fmt: skip
CHOSEN_BY_MODULE = (*CHOSEN, "topk", "top_k")  # which in a config may be a setting of the sampler


@dataclass(frozen=True)
class Piece:
    """One module's stored tensors. nbytes: of all; read: bytes a token reads; reason: "" where skippable."""

    path: str
    nbytes: int
    read: float
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """Modules of one kind that are always read. share: of the bytes that a token reads, 0 to 1."""

    modules: str
    count: int
    bytes: float
    share: float
    reason: str

    def line(self) -> str:
        """For people."""
        share = "under 1%" if 0 < self.share < 0.01 else f"{self.share:.0%}"
        return f"{self.modules}: {self.count} x, {share} of these bytes: {self.reason}"


@dataclass(frozen=True)
class Reads:
    """What a token reads.

    bytes: of weights, by a dense step. skippable: their part in Zigzag layers, 0 to 1. sparsity: fraction
    of channels skipped, and `origin` where that number is from. gain: how many times faster decoding can get
    at most, were time spent on nothing but reading. experts: what is known of a mixture, "" for other models.
    """

    bytes: float
    skippable: float
    sparsity: float
    origin: str
    gain: float
    experts: str
    left_out: list[LeftOut]

    def lines(self) -> list[str]:
        """For people."""
        of = f" ({self.experts})" if self.experts else ""
        return [
            f"a token reads {self.bytes / 1e6:.1f} MB of weights{of}; {self.skippable:.0%} can be skipped:",
            f"  at {self.sparsity:.0%} sparsity ({self.origin}) decoding is at most {self.gain:.2f}x as fast",
            "always read:",
            *(f"  {one.line()}" for one in self.left_out),
        ]


def summed(pieces: Iterable[Piece], experts: str, sparsity: float, origin: str) -> Reads:
    """The account of a model's modules."""
    pieces = list(pieces)
    total = sum(piece.read for piece in pieces)
    skippable = sum(piece.read for piece in pieces if not piece.reason) / max(total, 1)
    groups: dict[tuple[str, str], list[float]] = {}
    for piece in pieces:
        if piece.reason:
            what = (
                "norms, biases and the like"
                if piece.reason == VECTORS
                else re.sub(r"\.\d+(?=\.|$)", ".*", piece.path)
            )
            groups.setdefault((what, piece.reason), []).append(piece.read)
    left_out = [
        LeftOut(what, len(reads), sum(reads), sum(reads) / max(total, 1), reason)
        for (what, reason), reads in groups.items()
    ]
    left_out.sort(key=lambda one: -one.bytes)
    gain = 1 / (1 - skippable * sparsity)
    return Reads(total, skippable, sparsity, origin, gain, experts, left_out)


class Fractions:
    """Which part of each module's weights a token reads.

    head: the path of a tied embedding, "" where the head is a matrix of its own. experts: as text.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> None:
        self._modules, self._config = modules, config
        self._found: dict[str, str] = {}
        self.head = _tied(modules)
        self._unknown = False
        self._ratios: dict[tuple[int, int], None] = {}

    def of(self, path: str) -> float:
        """0 to 1; modules of other senses than text are not read at all."""
        module = self._modules[owner(self._modules, path)]
        if TOWER.search(path):
            return 0.0
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            return 1.0 if path == self.head else 1 / module.weight.shape[0]
        total = getattr(module, "num_experts", None) if is_experts(module) else None
        if total is None and (found := EXPERT.search(path)):
            listed = self._modules_of(path[: found.start()])
            total = len(listed.get("experts", ())) or None
        if total is None or ATTENTION.search(path):
            return 1.0
        chosen = self._chosen(path, total)
        if chosen is None:
            self._unknown = True
            return 1.0
        self._ratios[chosen, total] = None
        return chosen / total

    @property
    def experts(self) -> str:
        """What was found of a mixture by the calls of `of`; "" without one."""
        said = [f"{chosen} of {total} experts" for chosen, total in self._ratios]
        return ", ".join([*said, *(["experts per token unknown: all are counted"] if self._unknown else [])])

    def _modules_of(self, path: str) -> nn.Module:
        return self._modules.get(path, nn.Module())

    def _chosen(self, path: str, total: int) -> int | None:
        """How many experts a token is sent to: as the modules around have it, else config.json."""
        while path:
            path = path.rpartition(".")[0]
            around = self._modules_of(path)
            parts = [around, *(value for value in around.values() if isinstance(value, nn.Module))]
            for part in parts if path else ():
                own = {**part, **vars(part)}  # a module keeps lists and tables among its arrays
                settings = [own, *(_settings(own.get(name)) for name in ("args", "config"))]
                for one in settings:
                    if found := _named(one, total, CHOSEN_BY_MODULE):
                        return found
        inner = [value for value in self._config.values() if isinstance(value, dict)]
        return next((found for one in [*inner, self._config] if (found := _named(one, total, CHOSEN))), None)


def owner(modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of the innermost module that holds what lies at `path`: itself, unless that is a list."""
    while path not in modules:
        path = path.rpartition(".")[0]
    return path


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds one matrix for each of several experts."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (SwitchLinear, QuantizedSwitchLinear))


def expert_counts(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Block's path -> number of its experts, where it has any: a layer of so many outputs is a router."""
    found: dict[str, int] = {}
    for path, module in modules.items():
        block = BLOCK.search(path)
        if block and is_experts(module):
            found[path[: block.end()]] = module.num_experts
    return found


def tell_chosen(model: nn.Module) -> None:
    """Let a model's Zigzag experts know how many of them a token is sent to; all, where that is unknown."""
    modules = dict(model.named_modules())
    fractions = Fractions(modules, {})
    for path, module in modules.items():
        if is_experts(module) and hasattr(module, "chosen"):
            module.chosen = round(fractions.of(path) * module.num_experts)


def _settings(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else getattr(value, "__dict__", {})


def _named(settings: Mapping[str, Any], total: int, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = settings.get(name)
        if isinstance(value, list):  # one number a layer
            value = max((one for one in value if isinstance(one, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= total:
            return value
    return None


def _outputs(module: nn.Module) -> int | None:
    """How many outputs a linear layer, packed or not, has; None for other modules."""
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and "spqt" not in type(module).__module__:
        return int(module.weight.shape[0])
    return getattr(module, "outputs", None)  # ours, whose weight has another form


def _tied(modules: Mapping[str, nn.Module]) -> str:
    """The path of the embedding that is the head as well; "" where there is a matrix of as many outputs."""
    embeddings = {
        path: module.weight.shape[0]
        for path, module in modules.items()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and not BLOCK.search(path)
    }
    if not embeddings:
        return ""
    own = any(
        not BLOCK.search(path) and _outputs(one) in embeddings.values() for path, one in modules.items()
    )
    words = [path for path in embeddings if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings)$", path)]
    return "" if own else (words or list(embeddings))[0]
