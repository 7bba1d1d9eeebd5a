"""What a model's name means: a path on this disk, or a model on the hub."""

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".gguf", ".safetensors", ".json", ".jsonl", ".txt", ".toml", ".bin", ".pt", ".npz", ".zip")


def is_hub_id(name: str) -> bool:
    """Whether a name of nothing that is here means org/name on the hub: a folder `org` makes it a path."""
    if not HUB_ID.fullmatch(name) or Path(name).suffix.lower() in FILES:
        return False
    return not Path(name).parent.is_dir()


def elsewhere(name: str) -> str:
    """The end of a hint where a folder here hides an organization of the hub; else empty."""
    parent = Path(name).parent
    if not HUB_ID.fullmatch(name) or not parent.is_dir():
        return ""
    return f"; for the hub's {name} run elsewhere: a folder {parent} lies here"
