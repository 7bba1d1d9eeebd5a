"""What config.json of a converted model says of its layers and thresholds, typed and checked.

It knows no other file: `folder` checks that the shards agree with it.

    "quantization": {"group_size": 64, "bits": 4, "mode": "affine",
        "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 4, "mode": "zigzag", NEEDS: true,
            "spqt": {"band": 3584, "threshold": 0.012, "curve": [0.0, ...]}}}
    "spqt": {"format_version": 1, "fingerprint": "...", "content": "...", "source": {...},
             "versions": {...}, "shards": {"model.safetensors": "sha256"},
             "calibration": {"fingerprint": "...", "sparsity": 0.25, "method": "uniform", ...}}

The entry of a mixture's experts also has their number in `spqt`: {"band": 768, "experts": 128, ...}.
"""

import copy
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import layout
from spqt_cli.format.config_json import CONFIG
from spqt_cli.format.thresholds import CURVE_SPARSITIES

FORMAT_VERSION = 2  # the newest that is read; folders without Zigzag experts are of version 1
MODE = "zigzag"  # the `mode` of a Zigzag layer's entry
# A key in each entry that says nothing to spqt. Plain mlx-lm passes an entry's keys as arguments and stops at
# the first that it doesn't know, which this one is (keys are sorted): its error then says what to do.
NEEDS = "model made by spqt, which mlx-lm alone cannot run: pip install spqt, then spqt run MODEL"


class ThresholdsError(SpqtError):
    """The thresholds are damaged or belong to other weights; the layers' settings are sound."""


@dataclass(frozen=True)
class Layer:
    """A Zigzag layer's entry in config.json. experts: how many matrices it holds, None for a plain layer.

    threshold: None before calibration; curve: () likewise.
    """

    bits: int
    group_size: int
    band: int
    experts: int | None
    threshold: float | None
    curve: Sequence[float]


@dataclass(frozen=True)
class CalibrationRecord:
    """What config.json says of the calibration. sparsity: 0 to below 1; kl: to dense, in nats, if recorded.

    record: all of it as read, for reports.
    """

    sparsity: float
    kl: float | None
    record: Mapping[str, Any]


def entries(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> entry, unchecked, of every Zigzag layer of a config, in the order of the file."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return {}
    return {
        path: entry
        for path, entry in quantization.items()
        if isinstance(entry, dict) and entry.get("mode") == MODE
    }


def format_version(config: dict[str, Any]) -> int:
    """The version of the format that a config's layers need."""
    found = (entry.get("spqt") for entry in entries(config).values())
    return 2 if any("experts" in one for one in found if isinstance(one, dict)) else 1


def settings_fingerprint(config: dict[str, Any]) -> str:
    """A hash of the convert-time settings: bits, group and band of every layer, embedding and head included.

    Thresholds are no part of it, so that calibration leaves the weights' identity alone.
    """
    quantization = config.get("quantization")
    listed = sorted(quantization.items()) if isinstance(quantization, dict) else []
    settings = [[name, _lasting(entry) if isinstance(entry, dict) else entry] for name, entry in listed]
    text = json.dumps([format_version(config), settings], separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(entry: dict[str, Any]) -> dict[str, Any]:
    """What calibration does not write of a layer's entry."""
    spqt = entry.get("spqt")
    lasting = {"band": spqt.get("band")} if isinstance(spqt, dict) else {}
    if isinstance(spqt, dict) and "experts" in spqt:
        lasting["experts"] = spqt["experts"]
    return {name: value for name, value in entry.items() if name not in ("spqt", NEEDS)} | lasting


def weights_fingerprint(section: dict[str, Any]) -> str:
    """What a calibration belongs to, from the `spqt` section: a hash of settings and shards' SHA-256."""
    text = json.dumps([section.get("fingerprint"), section.get("shards")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check(config: dict[str, Any], where: Path) -> tuple[dict[str, Layer], CalibrationRecord | None]:
    """The Zigzag layers and the calibration of a config.

    Raises SpqtError for one that is not a converted model of this version, or whose entries are damaged, and
    ThresholdsError where all but the thresholds is sound.
    """
    section = config.get("spqt")
    if not isinstance(section, dict) or not entries(config):
        raise SpqtError(f"{where} is not a converted model", f"convert it first: spqt convert {where}")
    version = section.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SpqtError(f"{where} has format version {version!r}", "convert the model again")
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"{where} has format {version}, this spqt reads up to {FORMAT_VERSION}", "upgrade spqt"
        )
    for path, entry in entries(config).items():
        _check_settings(path, entry)
    if section.get("fingerprint") != settings_fingerprint(config):
        raise SpqtError(
            f"{where}/{CONFIG}: the layer settings were edited after conversion", "convert the model again"
        )
    layers = {path: _layer(path, entry) for path, entry in entries(config).items()}
    return layers, _calibration(section, layers, where)


def _check_settings(path: str, entry: dict[str, Any]) -> None:
    spqt = entry.get("spqt")
    if not isinstance(spqt, dict) or not set(spqt) <= {"band", "experts", "threshold", "curve"}:
        raise SpqtError(f"layer {path}: its entry in {CONFIG} is damaged", "convert the model again")
    group_size: Any = entry.get("group_size")
    bits, band = entry.get("bits"), spqt.get("band")
    if not layout.is_packable(bits, group_size) or type(band) is not int or not band:
        raise SpqtError(f"layer {path}: bad bits, group size or band", "convert the model again")
    experts = spqt.get("experts", 1)
    if type(experts) is not int or experts < 1:
        raise SpqtError(f"layer {path}: it can't have {experts!r:.40} experts", "convert the model again")
    if band < 0 or band % group_size:
        raise SpqtError(
            f"layer {path}: band {band} is no multiple of {group_size}", "convert the model again"
        )


def _layer(path: str, entry: dict[str, Any]) -> Layer:
    spqt = entry["spqt"]
    curve, threshold = spqt.get("curve", []), spqt.get("threshold", 0)
    sound = isinstance(curve, list) and len(curve) in (0, len(CURVE_SPARSITIES))
    if not sound or not all(_is_threshold(number) for number in [*curve, threshold]):
        raise ThresholdsError(
            f"layer {path}: thresholds must be finite and not negative, {len(CURVE_SPARSITIES)} on a curve",
            "run spqt calibrate again",
        )
    form = (entry["bits"], entry["group_size"], spqt["band"], spqt.get("experts"))
    return Layer(*form, spqt.get("threshold"), tuple(curve))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_threshold(value: Any) -> bool:
    largest = (1 << 63) - 1 if isinstance(value, int) else sys.float_info.max  # MLX takes no larger integer
    return _is_number(value) and 0 <= value <= largest  # false for NaN


def _calibration(
    section: dict[str, Any], layers: Mapping[str, Layer], where: Path
) -> CalibrationRecord | None:
    """Thresholds must be there for all layers or none, and belong to these weights."""
    with_threshold = sum(layer.threshold is not None for layer in layers.values())
    found, hint = section.get("calibration"), f"spqt calibrate {where}"
    if found is None and not with_threshold:
        return None
    if not isinstance(found, dict) or found.get("fingerprint") != weights_fingerprint(section):
        raise ThresholdsError(f"{where}: its thresholds belong to another model", hint)
    kl = found.get("kl")
    if "kl" in found and not (_is_number(kl) and abs(kl) <= sys.float_info.max):
        raise ThresholdsError(f"{where}: calibrated with a KL of {kl!r}", hint)
    sparsity = found.get("sparsity")
    if not (_is_number(sparsity) and 0 <= sparsity < 1):
        raise ThresholdsError(f"{where}: calibrated for a sparsity of {sparsity!r}", hint)
    if with_threshold != len(layers):
        raise ThresholdsError(f"{where}: {with_threshold} of {len(layers)} layers have a threshold", hint)
    return CalibrationRecord(sparsity, kl, found)


def without_thresholds(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config, its entries sound or not, with no trace of a calibration."""
    config = copy.deepcopy(config)
    config["spqt"].pop("calibration", None)
    for entry in entries(config).values():
        for key in ("threshold", "curve"):
            (entry.get("spqt") or {}).pop(key, None)
    return config
