"""Reads and writes `config.json` of any model folder, and names the other files of one.

`contract` checks what a converted model's config.json must hold. No weights are opened here.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spqt_cli.errors import CONVERT_AGAIN, SpqtError
from spqt_cli.system import files

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CODE_KEYS = ("model_file", "auto_map")  # config keys that name code of the model's own
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
# What goes along with the weights: never code.
KEPT = (
    *TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template*.json", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
GGUF = ".gguf"
LONGEST_JSON = 64 << 20  # bytes of a config or an index; the largest index seen has 20 MB


def to_convert(path: Path) -> str:
    """What to do about a path that holds no model to be converted: a hint."""
    if not path.is_dir():
        return "give a model's folder" + files.near(path)
    found = gguf_files(path)
    return (
        f"it holds {found[0].name}: name that" if found else "give a model folder, a hub id or a .gguf file"
    )


def converted(path: Path, wanted: str = "give a converted folder") -> str:
    """What to do about a path that is no converted folder: a hint, also to convert a .gguf file first."""
    if path.exists():
        found = gguf_files(path)
        return f"convert it first: {_converting(found[0])}" if found else wanted
    near = files.near_paths(path)
    hint = f"{wanted}; near it: {', '.join(map(str, near))}" if near else wanted
    ggufs = [one for one in near if one.suffix.lower() == GGUF]
    return f"{hint}; a {GGUF} file is converted first: {_converting(ggufs[0])}" if ggufs else hint


def any_model(path: Path) -> str:
    """What to do about a path that holds no model which mlx-lm or spqt runs: a hint."""
    return converted(path, "give a model folder, or a hub id (org/name)")


def gguf_files(path: Path) -> list[Path]:
    """A .gguf file itself, or those in a folder."""
    return [
        one for one in (sorted(path.iterdir()) if path.is_dir() else [path]) if one.suffix.lower() == GGUF
    ]


def _converting(path: Path) -> str:
    return f"spqt convert {shlex.quote(str(path))} -o FOLDER --calibrate"


def read_config(folder: Path, hint: Callable[[Path], str] = to_convert) -> dict[str, Any]:
    """The parsed `config.json` of a model folder, Zigzag or not. hint: of an error, where there is none."""
    path = folder / CONFIG
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise SpqtError(f"{path} is no file", CONVERT_AGAIN)
    if path.is_file() and path.stat().st_size > LONGEST_JSON:
        raise SpqtError(f"{path} is too long to be a config", CONVERT_AGAIN)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "is not found"
            raise SpqtError(f"{folder} {what}", hint(folder)) from None
        raise SpqtError(f"{folder} has no {CONFIG}", hint(folder)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpqtError(f"{path} can't be read: {error}", CONVERT_AGAIN) from None
    if not isinstance(config, dict):
        raise SpqtError(f"{path} is not a JSON object", CONVERT_AGAIN)
    return config


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """config with what a multimodal model says of its language model, under `text_config`, put on top."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def size(config: dict[str, Any], name: str) -> int | None:
    """A size that is a positive integer, None where config.json has none or something else there."""
    value = sizes(config).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Replace `config.json` in one step: a power cut leaves the old file or the new one.

    `quantization` is mirrored as `quantization_config`, as mlx-lm's own save does.
    """
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]
    files.replace_text(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
