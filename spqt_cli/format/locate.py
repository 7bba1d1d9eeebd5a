"""Tells whether a model's name is a path or a hub id, and opens the converted folder that it names."""

import re
from pathlib import Path

from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.format import config_json
from spqt_cli.format.folder import Folder
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


def open_folder(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Folder:
    """The converted folder at a local path, or of a hub id in the hub's own cache; checked.

    Raises SpqtError where nothing is there or where it is damaged, UsageError for a revision of a path.
    """
    if (path := _local(name, revision)) is not None:
        return Folder(path, trust_remote_code=trust_remote_code)
    from spqt_cli.format import hub

    return hub.download(name, revision, trust_remote_code=trust_remote_code)


def _local(name: str, revision: str | None) -> Path | None:
    """The folder at a local path; None where the name is a hub id."""
    local = files.expanded(name)
    if not local.exists() and is_hub_id(name):
        return None
    if not local.is_dir():
        what = "is no folder" if local.exists() else "is not found"
        hint = config_json.converted(local, "give a converted folder, or a hub id (org/name)")
        raise SpqtError(f"{name} {what}", hint + elsewhere(name))
    if revision is not None:
        raise UsageError(f"--revision is for hub ids, and {name} is a path", "leave --revision out")
    return local
