"""A folder of adapters, checked and put around a model's layers by mlx-lm; nothing in it is passed over.

adapter_config.json and adapters.safetensors, as mlx-lm's `lora` writes them. It knows names and shapes, not
what adapters compute: that is `adapters.py`.
"""

from pathlib import Path
from typing import Any

from mlx import nn

from spqt_cli.errors import SpqtError
from spqt_cli.format import checkpoint_files
from spqt_cli.system import files

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
KINDS = ("lora", "dora", "full")
LEAVES = ("lora_a", "lora_b", "m")  # of adapters' parameters
ANOTHER = "an adapter fits the model that it was trained on, in any layout"
MOST_SCALE = 1e6
DAMAGED = "train or convert the adapter again"


def lacking(path: Path) -> str:
    """Why a path is no folder of adapters, where it holds no settings of any."""
    if path.is_dir():
        return f"{path} has no {CONFIG}"
    return f"{path} is no folder" if path.exists() else f"{path} is not found"


def check(path: Path) -> dict[str, Any]:
    """The settings of a folder of adapters, headers checked. Raises SpqtError for what is none or damaged."""
    if not (path / CONFIG).is_file():
        raise SpqtError(lacking(path), "give a folder of LoRA or DoRA adapters" + files.near(path))
    config = checkpoint_files.read_json(path / CONFIG)
    if "peft_type" in config:
        raise SpqtError(f"{path} is a PEFT adapter", f"spqt adapter {path} -o FOLDER, then give that")
    checkpoint_files.refuse_pipes(path)
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise SpqtError(
            f"{path / CONFIG}: fine_tune_type {kind!r} is not known", f"one of {', '.join(KINDS)}"
        )
    if kind != "full":
        _check_settings(path / CONFIG, config)
    checkpoint_files.read_shard(path / WEIGHTS, WEIGHTS)
    return config


def _check_settings(path: Path, config: dict[str, Any]) -> None:
    found = config.get("lora_parameters")
    settings: dict[str, Any] = found if isinstance(found, dict) else {}
    rank, keys = settings.get("rank"), settings.get("keys")
    sound = (
        type(rank) is int
        and rank > 0
        and type(config.get("num_layers")) is int
        and _is_number(settings.get("scale"), -MOST_SCALE, MOST_SCALE)
        and _is_number(settings.get("dropout"), 0, 1)
        and (keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys)))
    )
    if not sound:
        raise SpqtError(f"{path} needs num_layers, and rank, scale and dropout in lora_parameters", DAMAGED)


def _is_number(value: Any, least: float, below: float) -> bool:
    return type(value) in (int, float) and least <= value < below


def put_on(model: nn.Module, name: str | Path) -> None:
    """Put the adapters of a folder around a model's layers, ready to run.

    Raises SpqtError for a damaged folder, and where names or shapes are of another model.
    """
    from mlx_lm.utils import load_adapters

    path = files.expanded(name)
    config = check(path)
    try:
        load_adapters(model, str(path))
    except (SpqtError, MemoryError):
        raise
    except Exception as error:  # mlx-lm's code over a file of anyone's
        said = " ".join(str(error).split())[:300]
        raise SpqtError(f"the adapter {path} does not fit the model: {said}", ANOTHER) from None
    if config.get("fine_tune_type", "lora") != "full":
        _check_all_there(model, path)
    model.eval()


def _check_all_there(model: nn.Module, path: Path) -> None:
    """Refuse a file that lacks weights of an adapter that its config asks for: mlx-lm starts those anew."""
    stored, _ = checkpoint_files.read_shard(path / WEIGHTS, WEIGHTS)
    adapters = {place: module for place, module in model.named_modules() if "lora_a" in module}
    wanted = {f"{place}.{leaf}" for place, module in adapters.items() for leaf in LEAVES if leaf in module}
    if not wanted:
        raise SpqtError(f"the adapter {path} names no layer of the model", ANOTHER)
    if missing := wanted - stored.keys():
        raise SpqtError(f"{path / WEIGHTS} lacks {checkpoint_files.named(missing)}", DAMAGED)
