"""What a model's name means: a path on this disk, or a model on the hub; and the folder that it names."""

import re
from pathlib import Path

from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.system import files

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


def local_folder(path: str, revision: str | None = None) -> Path:
    """The folder of a converted model: a local one, or a hub id's in the hub's own cache."""
    local = files.expanded(path)
    if local.exists() or not is_hub_id(path):
        if not local.is_dir():
            what = "is no folder" if local.exists() else "is not found"
            hint = "give a converted folder, or a hub id (org/name)"
            raise SpqtError(f"{path} {what}", hint + elsewhere(path))
        if revision is not None:
            raise UsageError(f"--revision is for hub ids, and {path} is a path", "leave --revision out")
        return local
    from spqt_cli.format import hub

    return hub.download(path, revision)
