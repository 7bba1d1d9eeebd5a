"""Whether the parts of a converted folder belong together.

Every shard's metadata carries the fingerprint of the settings and a hash of all weights; config.json
carries both, and each shard's SHA-256. `check_model` reads headers only and runs before every load;
`verify` reads every byte.
"""

from pathlib import Path
from typing import Any

from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.format import checks, config_json, layout
from spqt_cli.format.config_json import METADATA_CONTENT, METADATA_KEY
from spqt_cli.system import files

AGAIN = "download or convert the model again"


def metadata(fingerprint: str, content: str) -> dict[str, str]:
    """The metadata of every shard: safetensors' `format`, the settings' fingerprint, the weights' hash."""
    return {"format": "mlx", METADATA_KEY: fingerprint, METADATA_CONTENT: content}


def check_model(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The config of a converted folder whose config, headers, sizes and hashes of settings agree.

    Raises SpqtError naming the part that was edited, mixed in, left over or lost.
    """
    config = config_json.read_config(folder)
    config_json.check(config, folder)
    checks.refuse_pipes(folder)
    if not trust_remote_code and (config.get("model_file") or config.get("auto_map")):
        raise UnsupportedError(
            f"{folder} brings its own code", "spqt convert never writes that; --trust-remote-code allows it"
        )
    section = config["spqt"]
    recorded = section.get("shards")
    if not isinstance(recorded, dict) or not recorded:
        raise SpqtError(f"{folder}: config.json lists no shards", AGAIN)
    names, _ = checks.shard_names(folder)
    present = {path.name for path in folder.iterdir() if path.match("model*.safetensors")}
    # mlx-lm loads every model*.safetensors it finds
    if stale := (present | set(names)) - recorded.keys():
        raise SpqtError(f"{folder}: not part of this model: {checks.named(stale)}", "delete or move them")
    tensors = checks.read_headers(folder, sorted(recorded))
    _check_depth(folder, config, len(tensors))
    for name in recorded:
        _check_metadata(folder, name, section)
    _check_layers(folder, config, tensors)
    return config


def _check_depth(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """mlx-lm makes lists of as many layers as config.json says, before it looks at any weight."""
    for sizes in (config, config_json.sizes(config)):
        layers = sizes.get("num_hidden_layers")
        if isinstance(layers, int) and layers > tensors:  # what is no number, mlx-lm can't count to
            raise SpqtError(
                f"{folder}: config.json says {layers} layers, but there are only {tensors} tensors", AGAIN
            )


def _check_metadata(folder: Path, name: str, section: dict[str, Any]) -> None:
    _, found = checks.read_shard(checks.confined(folder, name), name)
    for key, setting in ((METADATA_KEY, "fingerprint"), (METADATA_CONTENT, "content")):
        if key not in found or found[key] != section.get(setting):
            raise SpqtError(f"{folder / name} belongs to another conversion than config.json", AGAIN)


def _check_layers(folder: Path, config: dict[str, Any], tensors: dict[str, checks.Tensor]) -> None:
    """Every Zigzag layer's arrays must be there, in the shapes that its entry asks for."""
    for path, entry in config_json.entries(config).items():
        parts = [tensors.get(f"{path}.{leaf}") for leaf in ("weight", "scales", "biases")]
        weight = parts[0]
        if weight is None or None in parts or len(weight.shape) != 3:
            raise SpqtError(f"{folder}: layer {path} is incomplete", AGAIN)
        band = entry["spqt"]["band"]
        outputs, inputs = weight.shape[0] * band, weight.shape[1]
        wanted = layout.packed_shapes(outputs, inputs, entry["bits"], entry["group_size"], band)
        found = tuple(part.shape for part in parts if part is not None)
        if found != (wanted[0], wanted[1], wanted[1]) or weight.dtype != "U32":
            raise SpqtError(f"{folder}: layer {path} has other shapes than its entry asks for", AGAIN)


def verify(folder: Path) -> list[str]:
    """The shards of a converted folder, after every byte was held against its SHA-256."""
    config = check_model(folder)
    recorded: dict[str, str] = config["spqt"]["shards"]
    for name, wanted in recorded.items():
        if files.sha256(folder / name) != wanted:
            raise SpqtError(f"{folder / name} is damaged: its SHA-256 is not the recorded one", AGAIN)
    return list(recorded)
