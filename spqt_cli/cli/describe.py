"""What a converted folder holds and what a token reads of it, from config.json and headers alone."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten

from spqt_cli.backends import select
from spqt_cli.calibrate import result
from spqt_cli.convert import parameters, plan, requantize
from spqt_cli.decode import exact, fused, quality_warning
from spqt_cli.decode.bytes_read import Piece, Reads, is_experts, summed
from spqt_cli.format import locate, thresholds
from spqt_cli.format.folder import Folder

PACKED = ("weight", "scales", "biases")
# What is said of a fit and of a calibration, by the keys of config.json.
FITTED_WITH = {
    "method": "method {}",
    "windows": "{} texts",
    "own": "{} of them written by the source",
    "steps": "{} steps of training",
}
CALIBRATED_WITH = {
    "method": "method {}",
    "sparsity": "for {:.0%} sparsity",
    "realised": "{:.1%} of the Zigzag weights skipped on held-out text",
    "kl": "KL to dense {:.3f} nats per token",
    "tokens": "thresholds from {} tokens",
}
MOST_SAID = 1e12  # a number beyond it was not written by a fit or a calibration


@dataclass
class Summary:
    """Sizes in bytes; `calibration`, `fit`: what they say, or None.

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
    fit: dict[str, Any] | None = None
    zeros: str = ""
    backend: str = ""
    fused_blocks: fused.Report = field(default_factory=fused.Report)

    def text(self) -> str:
        """The summary as a few lines of text."""
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
        if self.fit is not None:
            lines.append(f"fitted: {_facts(FITTED_WITH, self.fit)}")
        if self.calibration is None:
            lines.append(f"not calibrated: decoding is dense; run: spqt calibrate {self.folder}")
        else:
            lines.append(f"calibrated: {_facts(CALIBRATED_WITH, self.calibration)}")
            if warning := quality_warning.warning(self.calibration.get("kl") or 0.0):
                lines.append(warning)
            if self.zeros:
                lines.append(self.zeros)
        lines.append(f"on backend {self.backend} {self.fused_blocks.line()}")
        return "\n".join(lines + self.reads.lines())


def describe(path: str, revision: str | None = None) -> Summary:
    """The summary of a converted folder or hub id."""
    folder = locate.open_folder(path, revision)
    sizes = {name: tensor.nbytes for name, tensor in folder.tensors.items()}
    zigzag = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in folder.layers)
    listed = [entry for entry in folder.config["quantization"].values() if isinstance(entry, dict)]
    own = [(one.get("bits"), one.get("group_size")) for one in listed if one.get("mode") == "affine"]
    facts = None
    if folder.calibration is not None:
        record = folder.calibration.record.items()
        facts = {key: value for key, value in record if not isinstance(value, (dict, list))}
    fit = folder.config["spqt"].get("fit")
    model = parameters.build(folder.config, str(folder))
    return Summary(
        folder=folder.path,
        model_type=str(folder.config.get("model_type")),
        layers=len(folder.layers),
        kinds=_counted((layer.bits, layer.group_size) for layer in folder.layers.values()),
        zigzag_bytes=zigzag,
        other_bytes=sum(sizes.values()) - zigzag,
        calibration=facts,
        own=_counted(own),
        reads=_reads(folder, model),
        fit=fit if isinstance(fit, dict) else None,
        zeros=result.stored_zeros(folder.calibration.record) if folder.calibration else "",
        backend=select.backend().name,
        fused_blocks=_fused_blocks(folder, model),
    )


def _facts(forms: Mapping[str, str], record: Mapping[str, Any]) -> str:
    """What config.json says, with units; what is there and is no number of its form is shown as it is."""
    found = []
    for key, form in forms.items():
        value = record.get(key)
        sound = isinstance(value, (int, float)) and abs(value) < MOST_SAID
        if sound or (isinstance(value, str) and form.endswith("{}")):
            found.append(form.format(value))
        elif key in record:
            found.append(f"{key} {value}")
    return ", ".join(found)


def _as_stored(entry: Any, module: Any) -> str:
    """Why a layer that today's plan would take is row-grouped."""
    if not is_experts(module):
        return plan.KEPT_BY_WISH
    mode = entry.get("mode") if isinstance(entry, dict) else None
    return plan.EXPERTS_PACKED if mode in requantize.KEPT else plan.EXPERTS_ROWS


def _counted(kinds: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    return dict(Counter(f"{bits} bits, group {group_size}" for bits, group_size in kinds))


def _fused_blocks(folder: Folder, model: nn.Module) -> fused.Report:
    """How the model's blocks would run here, once their layers are those of the folder."""
    model = exact.complete(model, folder.config["spqt"])
    layers = {id(module) for path, module in model.named_modules() if path in folder.layers}
    return fused.report(model, lambda layer: id(layer) in layers)


def _reads(folder: Folder, model: nn.Module) -> Reads:
    found, experts = pieces(folder, model)
    return summed(found, experts, *sparsity_of(folder, model))


def pieces(folder: Folder, model: nn.Module) -> tuple[list[Piece], str]:
    """(what a token reads, what is known of a mixture's experts); the reasons are those of a plan made today
    for the same model.
    """
    decide = plan.Decisions(model, plan.Wishes(), folder.config)
    tensors, found = folder.tensors, []
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        packed = f"{path}.scales" in tensors and leaf in PACKED
        if packed and leaf != PACKED[0]:
            continue
        parts = [f"{path}.{each}" for each in PACKED] if packed else [name]
        size = sum(tensors[part].nbytes for part in parts if part in tensors)  # mxfp4 has no biases
        reason = decide.reason(path, leaf, len(tensor.shape))
        if packed and path in folder.layers:
            reason = ""
        elif packed and reason == plan.BY_RULE:
            reason = _as_stored(folder.config["quantization"].get(path), decide.modules.get(path))
        found.append(Piece(path, size, decide.fractions.of(path) * size, reason))
    return found, decide.fractions.experts


def sparsity_of(folder: Folder, model: nn.Module) -> tuple[float, str]:
    """(the fraction of channels that decoding skips, where that number is from)."""
    if folder.calibration is not None and folder.calibration.sparsity:
        return folder.calibration.sparsity, "calibrated"
    count = sum(array.size for array in dict(tree_flatten(model.parameters())).values())
    return thresholds.default_sparsity(count), "not calibrated yet: the default for this size"
