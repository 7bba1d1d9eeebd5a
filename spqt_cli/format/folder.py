"""A converted folder, checked: config.json, shards, headers, index and calibration belong together.

Making a `Folder` checks it, so whoever holds one reads it without checking again. Every shard's metadata
carries the fingerprint of the settings and a hash of all weights; config.json carries both, and each
shard's SHA-256.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spqt_cli.errors import CONVERT_AGAIN, SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files, config_json, contract, layout, thresholds
from spqt_cli.format.checkpoint_files import Tensor
from spqt_cli.format.config_json import CODE_KEYS
from spqt_cli.format.contract import CalibrationRecord, Layer
from spqt_cli.system import files

METADATA_KEY = "spqt_fingerprint"  # in every shard's safetensors metadata
METADATA_CONTENT = "spqt_content"  # likewise: a hash of all weights, the same in every shard of one model


class Folder:
    """A converted folder whose config.json, headers, sizes and hashes of settings agree.

    path: where it lies. config: config.json as read. layers: path -> entry of every Zigzag layer, in the
    order of the file. shards: file name -> recorded SHA-256. tensors: name -> what the headers declare.
    calibration: None where the model has no thresholds.
    """

    path: Path
    config: dict[str, Any]
    layers: Mapping[str, Layer]
    shards: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    calibration: CalibrationRecord | None

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        """Read and check a converted folder; headers only, `verify` reads every byte.

        Raises SpqtError naming the part that was edited, mixed in, left over or lost, ThresholdsError where
        that is the calibration, UnsupportedError for a newer format and for code of the model's own.
        """
        self.path = path
        self.config = config_json.read_config(path, config_json.converted)
        self.layers, self.calibration = contract.check(self.config, path)
        checkpoint_files.refuse_pipes(path)
        if not trust_remote_code and any(self.config.get(key) for key in CODE_KEYS):
            raise UnsupportedError(
                f"{path} brings its own code", "spqt convert never writes that; --trust-remote-code allows it"
            )
        section = self.config["spqt"]
        self.shards = _recorded(path, section)
        headers = checkpoint_files.read_headers(path, sorted(self.shards))
        self.tensors = headers.tensors
        _check_depth(path, self.config, len(self.tensors))
        _check_metadata(path, headers.metadata, section)
        _check_shapes(path, self.layers, self.tensors)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def weights_fingerprint(self) -> str:
        """What a calibration belongs to: a hash of the settings and of every shard's SHA-256."""
        return contract.weights_fingerprint(self.config["spqt"])

    @property
    def curves(self) -> dict[str, Sequence[float]]:
        """Path of each Zigzag layer -> its thresholds at CURVE_SPARSITIES, () where it has none."""
        return {path: layer.curve for path, layer in self.layers.items()}

    def size(self, name: str) -> int | None:
        """A size that is a positive integer, None where config.json has none or something else there."""
        return config_json.size(self.config, name)

    def thresholds(self, sparsity: float) -> dict[str, float]:
        """Path of each Zigzag layer -> its threshold at a sparsity; 0.0 skips nothing.

        At the calibrated sparsity the calibrated ones, at others those that the curves give.
        Raises SpqtError where there are none, UsageError for a sparsity out of range.
        """
        calibrated = self.calibration.sparsity if self.calibration else None
        if sparsity and calibrated is None:
            raise SpqtError(
                f"{self} has no thresholds to derive {sparsity:.0%} from",
                f"spqt calibrate {self} --sparsity {sparsity}",
            )
        return {
            path: layer.threshold
            if layer.threshold is not None and sparsity == calibrated
            else thresholds.derive(layer.curve, sparsity)
            for path, layer in self.layers.items()
        }

    def verify(self) -> list[str]:
        """The names of the shards, after every byte was held against its SHA-256."""
        for name, wanted in self.shards.items():
            if files.sha256(self.path / name) != wanted:
                raise SpqtError(
                    f"{self.path / name} is damaged: its SHA-256 is not the recorded one", CONVERT_AGAIN
                )
        return list(self.shards)

    def write_calibration(
        self, chosen: Mapping[str, tuple[float, Sequence[float]]], record: Mapping[str, Any]
    ) -> None:
        """Replace config.json, in one step, by one with these thresholds; this object stays as it was read.

        chosen: path of every Zigzag layer -> threshold and curve. record: what is said of the calibration.
        """
        config = contract.without_thresholds(self.config)
        for path, entry in contract.entries(config).items():
            threshold, curve = chosen[path]
            entry["spqt"] |= {"threshold": threshold, "curve": list(curve)}
        config["spqt"]["calibration"] = {**record, "fingerprint": self.weights_fingerprint}
        config_json.write_config(self.path, config)


def is_converted(path: Path) -> bool:
    """Whether config.json of a folder says that spqt converted it; sound or not, `Folder` tells."""
    return "spqt" in config_json.read_config(path, config_json.any_model)


def remove_thresholds(path: Path) -> None:
    """Take all thresholds out of a converted folder, be they damaged: it runs dense again."""
    config = config_json.read_config(path, config_json.converted)
    if not contract.entries(config) or not isinstance(config.get("spqt"), dict):
        raise SpqtError(f"{path} is not a converted model", f"convert it first: spqt convert {path}")
    config_json.write_config(path, contract.without_thresholds(config))


def shard_metadata(fingerprint: str, content: str) -> dict[str, str]:
    """The metadata of every shard: safetensors' `format`, the settings' fingerprint, the weights' hash."""
    return {"format": "mlx", METADATA_KEY: fingerprint, METADATA_CONTENT: content}


def _recorded(path: Path, section: dict[str, Any]) -> dict[str, str]:
    """Shard -> SHA-256 as config.json has them; no other may lie there, since mlx-lm loads every one."""
    recorded = section.get("shards")
    if not isinstance(recorded, dict) or not recorded:
        raise SpqtError(f"{path}: config.json lists no shards", CONVERT_AGAIN)
    names, _ = checkpoint_files.shard_names(path)
    present = {file.name for file in path.iterdir() if file.match("model*.safetensors")}
    if stale := (present | set(names)) - recorded.keys():
        raise SpqtError(
            f"{path}: not part of this model: {checkpoint_files.named(stale)}", "delete or move them"
        )
    return {name: str(sha256) for name, sha256 in recorded.items()}


def _check_depth(path: Path, config: dict[str, Any], tensors: int) -> None:
    """mlx-lm makes lists of as many layers as config.json says, before it looks at any weight."""
    for sizes in (config, config_json.sizes(config)):
        layers = sizes.get("num_hidden_layers")
        if isinstance(layers, int) and layers > tensors:  # what is no number, mlx-lm can't count to
            raise SpqtError(
                f"{path}: config.json says {layers} layers, but there are only {tensors} tensors",
                CONVERT_AGAIN,
            )


def _check_metadata(path: Path, metadata: Mapping[str, dict[str, str]], section: dict[str, Any]) -> None:
    for name, found in metadata.items():
        for key, setting in ((METADATA_KEY, "fingerprint"), (METADATA_CONTENT, "content")):
            if key not in found or found[key] != section.get(setting):
                raise SpqtError(
                    f"{path / name} belongs to another conversion than config.json", CONVERT_AGAIN
                )


def _check_shapes(path: Path, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
    """Every Zigzag layer's arrays must be there, in the shapes that its entry asks for."""
    for name, layer in layers.items():
        parts = [tensors.get(f"{name}.{leaf}") for leaf in ("weight", "scales", "biases")]
        weight = parts[0]
        experts = () if layer.experts is None else (layer.experts,)
        if weight is None or None in parts or len(weight.shape) != len(experts) + 3:
            raise SpqtError(f"{path}: layer {name} is incomplete", CONVERT_AGAIN)
        bands, inputs, _ = weight.shape[-3:]
        shape = (*experts, bands * layer.band, inputs)
        wanted = layout.packed_shapes(shape, layer.bits, layer.group_size, layer.band)
        found = tuple(part.shape for part in parts if part is not None)
        if found != (wanted[0], wanted[1], wanted[1]) or weight.dtype != "U32":
            raise SpqtError(f"{path}: layer {name} has other shapes than its entry asks for", CONVERT_AGAIN)
