"""The model card, and the upload to the hub."""

import json
from pathlib import Path
from typing import Any

from spqt_cli import checks, files
from spqt_cli.plan import Plan
from spqt_cli.source import Checkpoint

NAME = "README.md"


def clean_tokenizer_config(folder: Path) -> None:
    """Take the names of custom code out of a copied tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    if path.exists():
        config = checks.read_json(path)
        if config.pop("auto_map", None):
            files.write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def text(config: dict[str, Any], checkpoint: Checkpoint, planned: Plan) -> str:
    """README.md of a converted folder."""
    quantization = config["quantization"]
    base = f"base_model: {checkpoint.repo}\n" if checkpoint.repo else ""
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, spqt]
{base}---
# {checkpoint.name}, Zigzag {quantization["bits"]} bit

Converted by [spqt](https://github.com/spqt/spqt) {config["spqt"]["versions"]["spqt"]}.
"""
