"""The on-disk contract: what `config.json` says about a converted model.

Owns FORMAT_VERSION, the names of files and keys, and the fingerprint of the convert-time settings.
It reads and writes `config.json` and never opens weights.

    "quantization": {"group_size": 64, "bits": 4, "mode": "affine",
        "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 4, "mode": "zigzag",
            "spqt": {"band": 3584, "threshold": 0.012, "curve": [0.0, ...]}}}
    "spqt": {"format_version": 1, "fingerprint": "...", "content": "...", "source": {...},
             "versions": {...}, "shards": {"model.safetensors": "sha256"},
             "calibration": {"fingerprint": "...", "sparsity": 0.25, "method": "uniform", ...}}
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import layout
from spqt_cli.system import files

FORMAT_VERSION = 1
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CODE_KEYS = ("model_file", "auto_map")  # config keys that name code of the model's own
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
# What goes along with the weights: never code.
KEPT = (
    *TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template*.json", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
LONGEST_JSON = 64 << 20  # bytes of a config or an index; the largest index seen has 20 MB
MODE = "zigzag"  # the `mode` of a Zigzag layer's entry
METADATA_KEY = "spqt_fingerprint"  # in every shard's safetensors metadata
METADATA_CONTENT = "spqt_content"  # likewise: a hash of all weights, the same in every shard of one model
# Sparsities at which an entry's `curve` gives the threshold: 0, 0.02, ..., 0.96, 0.98.
CURVE_SPARSITIES = tuple(i / 50 for i in range(50))


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder, Zigzag or not."""
    path = folder / CONFIG
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise SpqtError(f"{path} is no file", "download or convert the model again")
    if path.is_file() and path.stat().st_size > LONGEST_JSON:
        raise SpqtError(f"{path} is too long to be a config", "download or convert the model again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "is not found"
            raise SpqtError(f"{folder} {what}", "give a model's folder") from None
        raise SpqtError(
            f"{folder} has no {CONFIG}", "give a model folder, a hub id or a .gguf file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpqtError(f"{path} can't be read: {error}", "download or convert the model again") from None
    if not isinstance(config, dict):
        raise SpqtError(f"{path} is not a JSON object", "download or convert the model again")
    return config


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """config with what a multimodal model says of its language model, under `text_config`, put on top."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def whole(config: dict[str, Any], name: str) -> int | None:
    """A size that is a positive whole number, None where config.json has none or something else there."""
    value = sizes(config).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def entries(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> config entry of every Zigzag layer, in the order of the file."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return {}
    return {
        path: entry
        for path, entry in quantization.items()
        if isinstance(entry, dict) and entry.get("mode") == MODE
    }


def fingerprint(config: dict[str, Any]) -> str:
    """A hash of the convert-time settings: bits, group and band of every layer, embedding and head included.

    Thresholds are no part of it, so that calibration leaves the weights' identity alone.
    """
    quantization = config.get("quantization")
    listed = sorted(quantization.items()) if isinstance(quantization, dict) else []
    settings = [[name, _lasting(entry) if isinstance(entry, dict) else entry] for name, entry in listed]
    text = json.dumps([FORMAT_VERSION, settings], separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(entry: dict[str, Any]) -> dict[str, Any]:
    """What calibration does not write of a layer's entry."""
    spqt = entry.get("spqt")
    band = {"band": spqt.get("band")} if isinstance(spqt, dict) else {}
    return {name: value for name, value in entry.items() if name != "spqt"} | band


def check(config: dict[str, Any], where: Path) -> None:
    """Refuse a config that is not a converted model of this version, or whose entries are damaged."""
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
        _check_entry(path, entry)
    if section.get("fingerprint") != fingerprint(config):
        raise SpqtError(
            f"{where}/{CONFIG}: the layer settings were edited after conversion", "convert the model again"
        )
    _check_calibration(config, where)


def _check_entry(path: str, entry: dict[str, Any]) -> None:
    spqt = entry.get("spqt")
    if not isinstance(spqt, dict) or not set(spqt) <= {"band", "threshold", "curve"}:
        raise SpqtError(f"layer {path}: its entry in {CONFIG} is damaged", "convert the model again")
    bits, group_size, band = entry.get("bits"), entry.get("group_size"), spqt.get("band")
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (bits, group_size, band))
    if not whole or bits not in layout.BITS or group_size not in layout.GROUP_SIZES or not band:
        raise SpqtError(f"layer {path}: bad bits, group size or band", "convert the model again")
    assert isinstance(band, int)
    if band < 0 or band % group_size:
        raise SpqtError(
            f"layer {path}: band {band} is no multiple of {group_size}", "convert the model again"
        )
    curve = spqt.get("curve", [])
    sound = isinstance(curve, list) and len(curve) in (0, len(CURVE_SPARSITIES))
    if not sound or not all(_is_threshold(number) for number in [*curve, spqt.get("threshold", 0)]):
        raise SpqtError(
            f"layer {path}: thresholds must be finite and not negative, {len(CURVE_SPARSITIES)} on a curve",
            "run spqt calibrate again",
        )


def _is_threshold(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    largest = (1 << 63) - 1 if isinstance(value, int) else sys.float_info.max  # MLX takes no larger whole one
    return 0 <= value <= largest  # false for NaN


def _check_calibration(config: dict[str, Any], where: Path) -> None:
    """Thresholds must be there for all layers or none, and belong to these weights."""
    with_threshold = [path for path, entry in entries(config).items() if "threshold" in entry["spqt"]]
    calibration = config["spqt"].get("calibration")
    if calibration is None and not with_threshold:
        return
    if not isinstance(calibration, dict) or calibration.get("fingerprint") != weights_fingerprint(config):
        raise SpqtError(f"{where}: its thresholds belong to another model", f"spqt calibrate {where}")
    kl = calibration.get("kl", 0.0)
    if not isinstance(kl, (int, float)) or isinstance(kl, bool) or not abs(kl) <= sys.float_info.max:
        raise SpqtError(f"{where}: calibrated with a KL of {kl!r}", f"spqt calibrate {where}")
    share = calibration.get("sparsity")
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
        raise SpqtError(f"{where}: calibrated for a sparsity of {share!r}", f"spqt calibrate {where}")
    if len(with_threshold) != len(entries(config)):
        raise SpqtError(
            f"{where}: {len(with_threshold)} of {len(entries(config))} layers have a threshold",
            f"spqt calibrate {where}",
        )


def weights_fingerprint(config: dict[str, Any]) -> str:
    """What a calibration belongs to: the settings and the SHA-256 of every shard."""
    section = config["spqt"]
    text = json.dumps([section.get("fingerprint"), section.get("shards")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Replace `config.json` in one step: a power cut leaves the old file or the new one.

    `quantization` is mirrored as `quantization_config`, as mlx-lm's own save does.
    """
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".config-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        files.sync(Path(temporary))
        os.replace(temporary, folder / CONFIG)
        files.sync(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
