"""What a converted folder holds, read from config.json and the shards' headers alone."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spqt_cli import calibration, format, identity, source


@dataclass
class Summary:
    """Sizes in bytes; `calibration`: what it says, or None.

    kinds: Zigzag layers per (bits, group size). own: likewise, row-grouped layers that differ from the
    model's default, such as embedding and head. zeros: a line on layers whose inputs have exact zeros, or "".
    """

    folder: Path
    model_type: str
    layers: int
    kinds: dict[str, int]
    zigzag_bytes: int
    other_bytes: int
    calibration: dict[str, Any] | None
    own: dict[str, int]
    zeros: str = ""

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
            if said := calibration.stored_warning(self.calibration):
                lines.append(said)
            if self.zeros:
                lines.append(self.zeros)
        return "\n".join(lines)


def describe(path: str, revision: str | None = None) -> Summary:
    """The summary of a converted folder or hub id."""
    from safetensors import safe_open

    folder = source.local_folder(path, revision=revision)
    config = identity.check_model(folder)
    entries = format.entries(config)
    zigzag = other = 0
    for shard in config["spqt"]["shards"]:
        with safe_open(str(folder / shard), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                part = file.get_slice(name)
                size = _bytes(part.get_dtype(), part.get_shape())
                if name.rpartition(".")[0] in entries:
                    zigzag += size
                else:
                    other += size
    listed = [entry for entry in config["quantization"].values() if isinstance(entry, dict)]
    kinds, own = (
        Counter(_kind(one) for one in listed if one.get("mode") == mode) for mode in (format.MODE, "affine")
    )
    facts = config["spqt"].get("calibration")
    zeros = calibration.stored_zeros(facts)
    if facts is not None:
        facts = {key: value for key, value in facts.items() if not isinstance(value, (dict, list))}
    model_type = str(config.get("model_type"))
    return Summary(folder, model_type, len(entries), dict(kinds), zigzag, other, facts, dict(own), zeros)


def _kind(entry: dict[str, Any]) -> str:
    return f"{entry.get('bits')} bits, group {entry.get('group_size')}"


def _bytes(dtype: str, shape: list[int]) -> int:
    digits = "".join(filter(str.isdigit, dtype.partition("_")[0]))
    size = int(digits or 8) // 8
    for length in shape:
        size *= length
    return size
