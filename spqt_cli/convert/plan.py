"""What becomes of every tensor: Zigzag, row-grouped as mlx-lm would, or kept; sizes, shards, memory.

Everything is known before a weight is read, since shapes and dtypes come from headers and mlx-lm's
own `sanitize` runs on lazy arrays. It reads no weights and writes nothing.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.convert import parameters, requantize
from spqt_cli.convert.source import DTYPES, Checkpoint, text_config
from spqt_cli.decode import bytes_read
from spqt_cli.decode.bytes_read import BLOCK, TOWER
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import checkpoint_files, layout
from spqt_cli.format.contract import MODE, NEEDS

ZIGZAG, ROWS, PLAIN = "zigzag", "row-grouped", "kept"
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # MLX dtype -> safetensors' name
ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|\w*expert_gate)(\.|$)")
BASE_BYTES = 300 << 20  # Python, MLX, mlx-lm and its tokenizer library (measured: benchmarks/memory.py)
LARGEST_TENSORS = 3  # held at once while one is cast, quantized and written
HEAD_BITS = 5  # of embedding and head, at least: the most quality per byte read (docs/quality.md)


@dataclass(frozen=True)
class Part:
    """One tensor of the output: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return checkpoint_files.Tensor(self.dtype, self.shape, "").nbytes


@dataclass(frozen=True)
class Unit:
    """One tensor of the model and the parts it is written as.

    source: its name in the checkpoint, None where mlx-lm makes it of several tensors.
    nbytes: of the tensor before quantization. reason: why it is not Zigzag. read: the part of it that a
    token reads, 0 to 1.
    """

    name: str
    kind: str
    dtype: mx.Dtype
    parts: tuple[Part, ...]
    nbytes: int
    source: str | None = None
    bits: int = 0
    group_size: int = 0
    band: int = 0
    reason: str = ""
    read: float = 1.0

    @property
    def path(self) -> str:
        """The module the tensor belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def written_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Wishes:
    """What the plan follows.

    dtype: of floating tensors, None for the model's own. skip: suffixes of layers to keep row-grouped.
    head_bits: of embedding and head, None for the larger of `bits` and HEAD_BITS.
    projections: (suffix of layer paths, bits, group size) of Zigzag layers that differ; the first holds.
    """

    bits: int = 4
    group_size: int = 64
    dtype: str | None = None
    skip: tuple[str, ...] = ()
    head_bits: int | None = None
    projections: tuple[tuple[str, int, int], ...] = ()


@dataclass
class Plan:
    """Units in the order they are written; `quantization` as config.json will have it.

    unquantized: layers that stay as they are because their inputs are no multiple of the group.
    experts: what is known of a mixture, "" for other models. weights: how many the model has.
    """

    units: list[Unit]
    quantization: dict[str, Any]
    dtype: str | None
    keep_vision_config: bool = False
    unquantized: list[str] = field(default_factory=list)
    experts: str = ""
    weights: int = 0

    def account(self, sparsity: float, origin: str) -> bytes_read.Reads:
        """What a token reads of the model as it will be written."""
        pieces = [
            bytes_read.Piece(unit.path, unit.written_bytes, unit.read * unit.written_bytes, unit.reason)
            for unit in self.units
        ]
        return bytes_read.summed(pieces, self.experts, sparsity, origin)

    @property
    def written_bytes(self) -> int:
        return sum(unit.written_bytes for unit in self.units)

    @property
    def source_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def zigzag_share(self) -> float:
        """The share of the written bytes that is Zigzag, 0 to 1."""
        zigzag = sum(unit.written_bytes for unit in self.units if unit.kind == ZIGZAG)
        return zigzag / max(self.written_bytes, 1)

    @property
    def memory_bytes(self) -> int:
        """The most memory that converting takes."""
        return BASE_BYTES + LARGEST_TENSORS * max((unit.nbytes for unit in self.units), default=0)


def make(checkpoint: Checkpoint, wishes: Wishes) -> tuple[Plan, dict[str, mx.array]]:
    """The plan for a checkpoint, and its lazy tensors under the names of the model's parameters."""
    model, weights, sources = parameters.load(checkpoint)
    dtype = wishes.dtype or _stored_dtype(checkpoint.config)
    decide = Decisions(model, wishes, checkpoint.config)
    units = [
        decide.unit(name, weights[name], dtype, sources.get(name)) for name in sorted(weights, key=_natural)
    ]
    keeps_vision = "vision_tower" in getattr(model, "model", {})
    count = sum(array.size for array in weights.values())
    plan = Plan(
        units, decide.quantization, dtype, keeps_vision, decide.unquantized, decide.fractions.experts, count
    )
    if not any(unit.kind == ZIGZAG for unit in units):
        raise UnsupportedError(
            f"{checkpoint.name}: no layer of this model can be stored in the Zigzag layout",
            "spqt handles linear layers of transformer blocks",
        )
    return plan, weights


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, so that the parts of one layer are read together."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def _stored_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that the model's config asks for, as mlx-lm reads it; None leaves each tensor's own."""
    inner = text_config(config)
    found = config.get("torch_dtype") or config.get("dtype") or inner.get("dtype") or inner.get("torch_dtype")
    return found if found in ("float16", "bfloat16", "float32") else None


BY_RULE = "kept as it is by mlx-lm's rules for this architecture"
EXPERTS_PACKED = "experts stay row-grouped, as the source has them packed"
EXPERTS_ROWS = "experts stay row-grouped: by a wish, or they were converted by an older spqt"
KEPT_BY_WISH = "asked to stay row-grouped, by the preset or the device's profile"
MIN_SIZE = layout.GROUP_SIZES[0]  # a layer narrower than a group (gemma3n's 4-wide mixers) gains nothing


class Decisions:
    """What becomes of each tensor, and what config.json must say about it."""

    def __init__(self, model: nn.Module, wishes: Wishes, config: dict[str, Any] | None = None) -> None:
        self.modules = dict(model.named_modules())
        self.wishes = wishes
        self.default = {"group_size": wishes.group_size, "bits": wishes.bits, "mode": "affine"}
        self.quantization: dict[str, Any] = dict(self.default)
        self.unquantized: list[str] = []
        self.predicate = getattr(model, "quant_predicate", None)
        self.cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
        self.experts = bytes_read.expert_counts(self.modules)
        embeddings = [one for one in self.modules.values() if isinstance(one, nn.Embedding)]
        self.vocabularies = {one.weight.shape[0] for one in embeddings}
        self.fractions = bytes_read.Fractions(self.modules, config or {})

    def unit(self, name: str, array: mx.array, dtype: str | None, source: str | None) -> Unit:
        kept = array.dtype
        if dtype is not None and mx.issubdtype(kept, mx.floating) and self.cast(name):
            kept = getattr(mx, dtype)
        path, _, leaf = name.rpartition(".")
        kind, bits, group_size = self.kind(path) if leaf == "weight" else (PLAIN, 0, 0)
        if not mx.issubdtype(kept, mx.floating):
            kind = PLAIN
        shape = tuple(array.shape)
        read = self.fractions.of(path)
        reason = "" if kind == ZIGZAG else self.reason(path, leaf, len(shape))
        if kind == PLAIN:
            parts: tuple[Part, ...] = (Part(name, NAMES[kept], shape),)
            return Unit(name, PLAIN, kept, parts, array.nbytes, source, reason=reason, read=read)
        band = layout.band_of(shape[-2], group_size) if kind == ZIGZAG else 0
        self.note(path, kind, bits, group_size, band)
        weight: tuple[int, ...]
        scales: tuple[int, ...]
        if kind == ZIGZAG:
            weight, scales = layout.packed_shapes(shape, bits, group_size, band)
        else:
            weight = (*shape[:-1], shape[-1] * bits // 32)
            scales = (*shape[:-1], shape[-1] // group_size)
        parts = (
            Part(f"{path}.weight", "U32", weight),
            Part(f"{path}.scales", NAMES[kept], scales),
            Part(f"{path}.biases", NAMES[kept], scales),
        )
        facts = (bits, group_size, band, reason, read)
        return Unit(name, kind, kept, parts, array.nbytes, source, *facts)

    def kind(self, path: str) -> tuple[str, int, int]:
        """(kind, bits, group size) of a module's weight."""
        module = self.modules[path]
        if "scales" in module:  # stored as MLX has it already, and kept
            self.quantization[path] = requantize.settings(module)
            return PLAIN, 0, 0
        if not hasattr(module, "to_quantized"):
            return PLAIN, 0, 0
        answer = self.predicate(path, module) if self.predicate is not None else True
        if not answer:
            return PLAIN, 0, 0
        asked = {**self.own(path, module), **(answer if isinstance(answer, dict) else {})}
        bits, group_size = asked["bits"], asked["group_size"]
        if asked["mode"] != "affine" or not layout.is_packable(bits, group_size):
            return PLAIN, 0, 0
        if self.is_zigzag(path, module):
            return ZIGZAG, bits, group_size
        if "mode" not in inspect.signature(module.to_quantized).parameters:
            return PLAIN, 0, 0  # a class of mlx-lm's that its own loader can't quantize
        if module.weight.shape[-1] % group_size:
            self.unquantized.append(path)
            return PLAIN, 0, 0
        return ROWS, bits, group_size

    def own(self, path: str, module: nn.Module) -> dict[str, Any]:
        """The settings asked for this module, before the model's own rules speak."""
        if self.is_zigzag(path, module):
            for suffix, bits, group_size in self.wishes.projections:
                if path.endswith(suffix):
                    return {**self.default, "bits": bits, "group_size": group_size}
        elif not BLOCK.search(path) and module.weight.shape[0] in self.vocabularies:
            return {**self.default, "bits": self.wishes.head_bits or max(self.wishes.bits, HEAD_BITS)}
        return self.default

    def is_zigzag(self, path: str, module: nn.Module) -> bool:
        return not self.why_not(path, module)

    def why_not(self, path: str, module: nn.Module) -> str:
        """Why a module's weight is not stored in Zigzag, in a few words; "" where it is."""
        found = BLOCK.search(path)
        if TOWER.search(path):
            return "no part of the language model"
        if isinstance(module, nn.Embedding):
            return "the head too, read whole" if path == self.fractions.head else "one row is looked up"
        experts = bytes_read.is_experts(module)
        if experts and ("scales" in module or found is None):
            return EXPERTS_PACKED if "scales" in module else "outside the blocks"
        if found is None and isinstance(module, nn.Linear):
            is_head = module.weight.shape[0] in self.vocabularies
            return "the head is read whole" if is_head else "outside the blocks"
        if found is None or not (experts or type(module) is nn.Linear):
            return f"a {type(module).__name__}, no linear layer of a block"
        if path.endswith(self.wishes.skip):
            return KEPT_BY_WISH
        block = path[: found.end()]
        gate_widths = (1, self.experts.get(block))  # of shared experts' gates and of routers
        is_gate = ROUTER.search(path) or module.weight.shape[0] in gate_widths
        if is_gate and not experts:
            return "chooses among experts"
        narrow = min(module.weight.shape[-2:]) < MIN_SIZE
        return f"narrower than a group of {MIN_SIZE}" if narrow else ""

    def reason(self, path: str, leaf: str, dimensions: int) -> str:
        """Why a tensor that is not Zigzag is not."""
        module = self.modules[bytes_read.owner(self.modules, path)]
        if dimensions < 2:
            return bytes_read.VECTORS
        if leaf not in ("weight", "scales"):  # those of what is packed already go with it
            return f"{leaf} of a {type(module).__name__}"
        return self.why_not(path, module) or BY_RULE

    def note(self, path: str, kind: str, bits: int, group_size: int, band: int) -> None:
        """List the layer in config.json: every Zigzag one, and others that differ from the default."""
        if kind == ZIGZAG:
            module = self.modules[path]
            experts = {"experts": module.num_experts} if bytes_read.is_experts(module) else {}
            self.quantization[path] = {
                "group_size": group_size, "bits": bits, "mode": MODE, NEEDS: True,
                "spqt": {"band": band, **experts},
            }  # fmt: skip
        elif {"group_size": group_size, "bits": bits, "mode": "affine"} != self.default:
            self.quantization[path] = {"group_size": group_size, "bits": bits, "mode": "affine"}
