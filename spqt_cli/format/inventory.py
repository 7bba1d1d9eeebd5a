"""Finds the converted models of this machine: below folders that are named, and in the hub's cache."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spqt_cli.errors import SpqtError
from spqt_cli.format.config_json import CONFIG
from spqt_cli.format.folder import Folder, is_converted
from spqt_cli.system import files


@dataclass(frozen=True)
class Found:
    """A converted model. name: what a command takes, a path or a hub id. size_bytes: of its weights.

    bits: of most Zigzag layers. sparsity: calibrated, 0 to 1; None without a calibration. kl: to its dense
    run at that sparsity, nats per token on held-out text; None where none was measured. fault: why it can't
    be used; nothing else is known then.
    """

    name: str
    size_bytes: int | None = None
    bits: int | None = None
    group_size: int | None = None
    sparsity: float | None = None
    kl: float | None = None
    fitted: str | None = None
    fault: str = ""


def find(places: Sequence[Path]) -> list[Found]:
    """The converted folders among `places` and directly below them, by name; damaged ones with their fault.

    Raises SpqtError for a place that is no folder.
    """
    found = {}
    for place in map(files.expanded, places):
        if not place.is_dir():
            raise SpqtError(
                f"{place} is no folder", "give folders that hold converted models" + files.near(place)
            )
        for path in [place, *_below(place)]:
            if (one := _look_at(path, str(path))) is not None:
                found[path.resolve()] = one
    return sorted(found.values(), key=lambda one: one.name)


def in_hub_cache() -> list[Found]:
    """The converted models that the hub's cache holds, by their ids; the newest revision of each."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repo in repos:
        if repo.repo_type == "model" and repo.revisions:
            newest = max(repo.revisions, key=lambda one: one.last_modified)
            found.append(_look_at(newest.snapshot_path, repo.repo_id))
    return sorted(filter(None, found), key=lambda one: one.name)


def _below(place: Path) -> Iterator[Path]:
    with files.disk_errors(place):
        yield from sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] != ".")


def _look_at(path: Path, name: str) -> Found | None:
    """What a folder holds; None where that is no converted model."""
    if not (path / CONFIG).is_file():
        return None
    try:
        if not is_converted(path):
            return None
        folder = Folder(path)
    except SpqtError as error:
        return Found(name, fault=error.cause)
    kinds = Counter((layer.bits, layer.group_size) for layer in folder.layers.values())
    (bits, group_size), _ = kinds.most_common(1)[0]
    found = Found(
        name,
        size_bytes=sum((path / shard).stat().st_size for shard in folder.shards),
        bits=bits,
        group_size=group_size,
        fitted=_method(folder),
    )
    if folder.calibration is None:
        return found
    return dataclasses.replace(found, sparsity=folder.calibration.sparsity, kl=folder.calibration.kl)


def _method(folder: Folder) -> str | None:
    fit = folder.config["spqt"].get("fit")
    return str(fit.get("method")) if isinstance(fit, dict) else None
