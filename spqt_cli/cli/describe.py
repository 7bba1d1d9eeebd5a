"""What a converted folder holds and what a token reads of it, from config.json and headers alone."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten

from spqt_cli.backends import select
from spqt_cli.calibrate import result
from spqt_cli.convert import parameters, plan
from spqt_cli.decode import exact, fused_block
from spqt_cli.decode.bytes_read import Piece, Reads, summed
from spqt_cli.format import checks, config_json, identity, locate, presets

PACKED = ("weight", "scales", "biases")


@dataclass
class Summary:
    """Sizes in bytes; `calibration`: what it says, or None.

    kinds: Zigzag layers per (bits, group size). own: likewise, row-grouped layers that differ from the
    model's default, such as embedding and head. zeros: a line on layers whose inputs have exact zeros, or "".
    reads: what a token reads, and what of it is always read. fused_blocks: how transformer blocks would run
    on `backend`, which is this machine's.
    """

    folder: Path
    model_type: str
    layers: int
    kinds: dict[str, int]
    zigzag_bytes: int
    other_bytes: int
    calibration: dict[str, Any] | None
    own: dict[str, int]
    reads: Reads
    zeros: str = ""
    backend: str = ""
    fused_blocks: fused_block.Report = field(default_factory=fused_block.Report)

    def text(self) -> str:
        """A few lines for people."""
        total = self.zigzag_bytes + self.other_bytes
        kinds, own = (
            ", ".join(f"{count} x {kind}" for kind, count in each.items()) for each in (self.kinds, self.own)
        )
        lines = [
            f"{self.folder}: {self.model_type}, {self.layers} Zigzag layers ({kinds})",
            f"weights {total / 1e6:.1f} MB, of which Zigzag {self.zigzag_bytes / total:.0%}",
        ]
        if own:
            lines.append(f"row-grouped with settings of their own: {own}")
        if self.calibration is None:
            lines.append(f"not calibrated: decoding is dense; run: spqt calibrate {self.folder}")
        else:
            wanted = ("method", "sparsity", "realised", "kl", "tokens")
            facts = [f"{key} {self.calibration[key]}" for key in wanted if key in self.calibration]
            lines.append("calibrated: " + ", ".join(facts))
            if said := result.stored_warning(self.calibration):
                lines.append(said)
            if self.zeros:
                lines.append(self.zeros)
        lines.append(f"on backend {self.backend} {self.fused_blocks.line()}")
        return "\n".join(lines + self.reads.lines())


def describe(path: str, revision: str | None = None) -> Summary:
    """The summary of a converted folder or hub id."""
    folder = locate.local_folder(path, revision=revision)
    config = identity.check_model(folder)
    tensors = checks.read_headers(folder, sorted(config["spqt"]["shards"]))
    entries = config_json.entries(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    zigzag = sum(one.nbytes for name, one in tensors.items() if name.rpartition(".")[0] in entries)
    listed = [entry for entry in config["quantization"].values() if isinstance(entry, dict)]
    kinds, own = (
        Counter(_kind(one) for one in listed if one.get("mode") == mode)
        for mode in (config_json.MODE, "affine")
    )
    facts = config["spqt"].get("calibration")
    zeros = result.stored_zeros(facts)
    if facts is not None:
        facts = {key: value for key, value in facts.items() if not isinstance(value, (dict, list))}
    model_type = str(config.get("model_type"))
    model = parameters.build(config, str(folder))
    reads = _reads(model, config, tensors)
    layers, other = len(entries), total - zigzag
    model = exact.complete(model, config["spqt"])
    zigzag_layers = {id(module) for path, module in model.named_modules() if path in entries}
    return Summary(
        folder,
        model_type,
        layers,
        dict(kinds),
        zigzag,
        other,
        facts,
        dict(own),
        reads,
        zeros,
        select.backend().name,
        fused_block.report(model, lambda layer: id(layer) in zigzag_layers),
    )


def _kind(entry: dict[str, Any]) -> str:
    return f"{entry.get('bits')} bits, group {entry.get('group_size')}"


def _reads(model: nn.Module, config: dict[str, Any], tensors: dict[str, checks.Tensor]) -> Reads:
    """What a token reads; the reasons are those of a plan made today for the same model."""
    decide = plan.Decisions(model, plan.Wishes(), config)
    entries = config_json.entries(config)
    pieces = []
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        packed = f"{path}.scales" in tensors and leaf in PACKED
        if packed and leaf != PACKED[0]:
            continue
        parts = [f"{path}.{each}" for each in PACKED] if packed else [name]
        size = sum(tensors[part].nbytes for part in parts if part in tensors)  # mxfp4 has no biases
        reason = decide.reason(path, leaf, len(tensor.shape))
        if packed and path in entries:
            reason = ""
        elif packed and reason == plan.BY_RULE:
            reason = plan.KEPT_BY_WISH  # today's plan would take it
        pieces.append(Piece(path, size, decide.fractions.of(path) * size, reason))
    found = config["spqt"].get("calibration")
    if found is not None and found["sparsity"]:
        share, origin = found["sparsity"], "calibrated"
    else:
        count = sum(array.size for array in dict(tree_flatten(model.parameters())).values())
        share, origin = presets.default_sparsity(count), "not calibrated yet: the default for this size"
    return summed(pieces, decide.fractions.experts, share, origin)
