"""Checks the shards of any model folder, their headers and their index, before MLX opens them.

MLX's own reader accepts overlapping, holed and wrapped files, so the `safetensors` library reads every
header first. Nothing here is ever unpickled, and no weight is loaded.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError
from spqt_cli.format.config_json import INDEX, LONGEST_JSON
from spqt_cli.system import files

FLOATING = {"BF16": 2, "F16": 2, "F32": 4}  # bytes per element
INTEGER = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
EIGHT_BITS = {"F8_E4M3": 1, "F8_E8M0": 1}  # read only where a scale explains them
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NAMED_TEMPLATES = "additional_chat_templates"  # a folder: one chat template a file, each by its name
MOST_NAMED = 10  # tensors named in one message
LONGEST_HEADER = 32 << 20  # bytes; safetensors allows 100 MB, which takes Python 1 GB to read
QUOTES_OF_A_TENSOR = 10  # in a header: around its name, "dtype", the dtype, "shape" and "data_offsets"


@dataclass(frozen=True)
class Tensor:
    """One tensor as a shard's header declares it: safetensors dtype, shape, file name."""

    dtype: str
    shape: tuple[int, ...]
    shard: str

    @property
    def nbytes(self) -> int:
        size = (FLOATING | INTEGER | EIGHT_BITS)[self.dtype]
        for length in self.shape:
            size *= length
        return size


@dataclass
class Headers:
    """What the headers of a folder's shards declare: tensors by name, and metadata by shard."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)


def named(names: Iterable[str]) -> str:
    """At most ten names for a message, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(listed[:MOST_NAMED]) + more


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not path.is_file():
        raise SpqtError(f"{path} is missing", AGAIN)
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise SpqtError(f"{path} is too large for JSON of a model", AGAIN)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpqtError(f"{path} can't be read: {error}", AGAIN) from None
    if not isinstance(value, dict):
        raise SpqtError(f"{path} is not a JSON object", AGAIN)
    return value


def confined(folder: Path, name: str) -> Path:
    """The path of a shard that an index names, if it stays inside the model's folder."""
    if not files.is_utf8(name):
        raise SpqtError(f"{folder / INDEX} names {name!a}, which is no text", AGAIN)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
        raise SpqtError(f"{folder / INDEX} names {name!r}, outside the model", "don't trust this model")
    if pure.suffix != ".safetensors":
        raise SpqtError(f"{folder / INDEX} names {name!r}, which is no .safetensors file", AGAIN)
    path = folder / name
    if not is_own(folder, path):
        raise SpqtError(f"{path} is a link that leaves the model", "don't trust this model")
    return path


def listed(folder: Path) -> list[Path]:
    """What lies in a folder that may be missing."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise SpqtError(f"{folder} can't be read: {error.strerror}", "check its permissions") from None


def refuse_pipes(folder: Path) -> None:
    """Refuse a folder that holds a pipe or a device: whatever library reads one waits for ever."""
    for path in (*folder.iterdir(), *listed(folder / NAMED_TEMPLATES)):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SpqtError(f"{path} is no file", AGAIN)


def is_own(folder: Path, path: Path) -> bool:
    """True if a path, its links followed, lies in the model's folder.

    From a snapshot of the hub's cache links may also lead into its `blobs`.
    """
    roots = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    real = Path(os.path.realpath(path))  # unlike resolve, it does not mind links that lead in a circle
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def shard_names(folder: Path) -> tuple[list[str], list[str]]:
    """The shards that make up the model, and those that it does not use."""
    # iterdir, not glob: a folder's name may hold brackets
    present = sorted(p.name for p in folder.iterdir() if p.match("model*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SpqtError(f"{folder / INDEX} has no weight_map", AGAIN)
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise SpqtError(f"{folder / INDEX}: a shard's name must be text", AGAIN)
        used = sorted(set(weight_map.values()))
        return used, [name for name in present if name not in used]
    if "model.safetensors" in present:
        return ["model.safetensors"], [name for name in present if name != "model.safetensors"]
    if len(present) == 1 and "-of-" not in present[0]:
        return present, []
    if present:
        raise SpqtError(f"{folder} has {len(present)} shards and no {INDEX}", AGAIN)
    return [], []


def read_headers(
    folder: Path, names: list[str], absent: list[str] | None = None, also: Iterable[str] = ()
) -> Headers:
    """What the shards `names` of a folder declare, each header parsed once and all checked against the index.

    absent: takes the names that the index has and no shard; None refuses them. Indexes list buffers and
    tied heads that were never written: whether the model needs them, its parameters tell. also: dtypes
    accepted besides FLOATING and INTEGER.
    """
    headers = Headers()
    for name in names:
        declared, headers.metadata[name] = read_shard(confined(folder, name), name, also)
        if twice := headers.tensors.keys() & declared.keys():
            raise SpqtError(f"{folder}: in two shards: {named(twice)}", AGAIN)
        headers.tensors |= declared
    if (folder / INDEX).is_file():
        _check_index(folder, headers.tensors, absent)
    return headers


def _check_index(folder: Path, tensors: dict[str, Tensor], absent: list[str] | None) -> None:
    weight_map = read_json(folder / INDEX)["weight_map"]
    missing = weight_map.keys() - tensors.keys()
    if absent is not None:
        absent.extend(sorted(missing))
    elif missing:
        raise SpqtError(f"{folder}: the index names tensors that no shard has: {named(missing)}", AGAIN)
    if extra := tensors.keys() - weight_map.keys():
        raise SpqtError(f"{folder}: the index lacks tensors that shards have: {named(extra)}", AGAIN)
    if moved := [name for name, tensor in tensors.items() if weight_map[name] != tensor.shard]:
        raise SpqtError(f"{folder}: in another shard than the index says: {named(moved)}", AGAIN)


def refuse_lost_head(folder: Path, absent: list[str]) -> None:
    """Of a model whose head is not tied: some of mlx-lm's classes would take the embedding in its place."""
    if heads := [name for name in absent if name.endswith("lm_head.weight")]:
        raise SpqtError(f"{folder}: the index names {heads[0]}, which no shard has", AGAIN)


def read_shard(path: Path, name: str, also: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that a shard's header declares, parsed and checked by `safetensors`.

    name: what the index calls the shard. also: dtypes accepted besides FLOATING and INTEGER.
    """
    if not path.is_file():
        raise SpqtError(f"{path} is missing", AGAIN)
    header = _header_text(path)
    try:
        with safe_open(path, framework="np") as shard:
            metadata = shard.metadata() or {}
            slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118
            tensors = {
                key: Tensor(str(part.get_dtype()), tuple(part.get_shape()), name)
                for key, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        if "unknown variant" in str(error):  # a dtype that the library does not know: find out whose
            _refuse_dtypes(path, _dtypes(path, header), also)
        raise SpqtError(f"{path} is no sound safetensors file: {error}", AGAIN) from None
    if _may_repeat_a_name(header, tensors, metadata):
        _dtypes(path, header)
    _refuse_dtypes(path, {key: tensor.dtype for key, tensor in tensors.items()}, also)
    return tensors, metadata


def _may_repeat_a_name(header: bytes, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    """True where a header holds more text than what `safetensors`, which keeps the last of two names, found.

    Counting quotes is exact where nothing is escaped, and spares a second parser for headers of megabytes.
    """
    quotes = QUOTES_OF_A_TENSOR * len(tensors) + (2 + 4 * len(metadata) if metadata else 0)
    return b"\\" in header or header.count(b'"') != quotes


def _refuse_dtypes(path: Path, dtypes: dict[str, str], also: Iterable[str]) -> None:
    known = {*FLOATING, *INTEGER, *also}
    for key, dtype in dtypes.items():
        if dtype not in known:
            raise UnsupportedError(
                f"{path}: tensor {key} has dtype {dtype}", "use a checkpoint in bf16, fp16 or fp32"
            )


def _dtypes(path: Path, text: bytes) -> dict[str, str]:
    """Tensor -> dtype as the header's own text has them; refuses names that occur twice."""
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SpqtError(f"{path} has a damaged header: {error}", AGAIN) from None
    tensors = {key: entry for key, entry in header.items() if isinstance(entry, dict) and "dtype" in entry}
    return {key: str(entry["dtype"]) for key, entry in tensors.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")  # the safetensors library keeps the last
    return found


def _header_text(path: Path) -> bytes:
    """A shard's header as it is stored.

    Refuses, by the first bytes, a header of absurd length and two texts that often stand for a shard.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
            length = int.from_bytes(start[:8], "little")
            if length > LONGEST_HEADER and path.stat().st_size > length:
                raise SpqtError(f"{path} has a header of {length} bytes, too long to be sound", AGAIN)
            rest = file.read(max(0, min(length, LONGEST_HEADER) + 8 - len(start)))
    except OSError as error:
        raise SpqtError(f"{path} can't be read: {error}", AGAIN) from None
    words = start.lstrip().lower()
    if words.startswith(b"version https://git-lfs"):
        raise SpqtError(f"{path} is a Git LFS pointer, not weights", f"{AGAIN}: git lfs pull, or hf download")
    if words.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise SpqtError(f"{path} is a web page, not weights", AGAIN)
    return (start + rest)[8 : 8 + length]


def refuse_no_weights(folder: Path) -> None:
    """Say why a folder without safetensors can't be used."""
    for pattern in PICKLES:
        if found := [path.name for path in folder.iterdir() if path.match(pattern)]:
            raise UnsupportedError(
                f"{folder} holds only pickled weights ({named(found)}), which spqt never opens",
                "use a repository with safetensors",
            )
    raise SpqtError(f"{folder} has no model*.safetensors", "give a model folder, a hub id or a .gguf file")
